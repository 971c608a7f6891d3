"""Emulation in other libraries' trainers: `lightning.EmulationCallback` and `huggingface.EmulationCallback`."""
