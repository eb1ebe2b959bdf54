"""Training: the recipe of gpt-oss-tiny and its evaluation."""
