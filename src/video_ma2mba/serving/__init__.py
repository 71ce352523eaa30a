"""One video, thousands of questions: a small server of memories, and a plugin for vLLM."""
