"""Preparation of data: rendering a small world of real clips. Needs the `av` extra; imports no torch."""
