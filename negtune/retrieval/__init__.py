"""Encode, search, mine, and train retrievers and rerankers."""
