"""The text side: a language model rewrites prompts, and a frozen generator and a reward judge the rewrites."""
