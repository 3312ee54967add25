"""The text that a model runs over if its user gives none: some prose, some talk and some code."""

from __future__ import annotations

PROMPTS = (
    "The lighthouse keeper wrote in his book every evening. On the last page of the year he found that",
    "Question: why does bread rise, and what goes wrong when it does not? Answer:",
    'def merge(left, right):\n    """Merge two sorted lists into one."""\n',
    "A short history of the bicycle. The first machines had no pedals, so riders",
    "Dear Sir or Madam, I bought one of your kettles in March. Since then",
    'import csv\n\n\ndef totals(path):\n    """The sum of each column of a table."""\n',
    "To solve x^2 - 5x + 6 = 0, we look for two numbers whose product is six and",
    "The committee met on Tuesday to discuss the bridge. Its engineers had warned that",
)
