"""Plugins that vLLM loads by itself. Nothing here imports TRL or transformers."""
