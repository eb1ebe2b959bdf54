"""The one exception type for mistakes that a user can mend. Knows nothing of the rest of the
package.
"""


class GptOssError(ValueError):
    """A user's mistake: what was expected, what came, what to do. Programs print it as one line."""
