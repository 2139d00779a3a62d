"""Words of a prompt: where they stand in it, and which tokens of a model they become."""

from .concepts import Concept, concepts
from .find import Found, find_words
from .phrases import Phrase, phrases

__all__ = ["Concept", "Found", "Phrase", "concepts", "find_words", "phrases"]
