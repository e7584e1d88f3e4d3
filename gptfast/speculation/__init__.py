"""Drafting several tokens and verifying them in one pass: from what, how many, which stay."""
