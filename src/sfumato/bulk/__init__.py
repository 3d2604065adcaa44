"""Many pictures at once, from a file of prompts, and what was done before is not done again.

prompts.py    a file of prompts, one request a line
drawing.py    what of it is not there yet, and drawing that
"""
