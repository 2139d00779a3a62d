"""Models for other evaluation programs: any vision-language model with any control."""
