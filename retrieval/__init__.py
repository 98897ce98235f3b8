"""The model, its training, and the search engine."""
