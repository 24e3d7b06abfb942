"""What a user would want to know about a compiled step."""
