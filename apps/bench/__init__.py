"""Measuring: what a control does to a model's task, and what it costs."""
