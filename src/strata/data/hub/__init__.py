"""Data sets and tokenizers of the Hugging Face hub, and folders that mirror them."""
