"""attnctl."""
