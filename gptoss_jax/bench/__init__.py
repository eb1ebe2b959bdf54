"""How fast is it: prefill and decode timed through the real steps, beside what the machine allows
and what other systems do. Loads nothing by itself.
"""
