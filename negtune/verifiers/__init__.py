"""Say of a completion whether it is correct, wrong, or could not be scored."""
