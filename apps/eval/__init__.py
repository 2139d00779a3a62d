"""Evaluation of vision-language models on the files of POPE, CHAIR, MME and AMBER."""
