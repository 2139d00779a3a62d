"""The methods: one paper per file, found by the registry."""
