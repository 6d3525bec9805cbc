"""Models as folders that Hugging Face transformers loads: out, and in again."""
