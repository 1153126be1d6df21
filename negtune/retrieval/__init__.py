"""Search: texts into vectors, vectors into ranked documents, ranked documents into lists to train on."""
