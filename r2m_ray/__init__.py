"""RLHF whose reward model reads the policy's hidden states and moves with it (R2M, arXiv 2601.22664)."""

__version__ = "0.1.0"
