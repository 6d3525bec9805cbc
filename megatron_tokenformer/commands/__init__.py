"""Command lines: each parses its arguments, calls the package, and prints what came of it."""
