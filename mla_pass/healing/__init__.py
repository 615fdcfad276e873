"""Healing: a short training of a converted model's latent attention towards what the original model predicts.

`run.heal` does it. `subject` says what it needs of a pair of models; `graphs`, `checkpoints` and `programs` are the
kinds there are. Nothing but `config` and `run` is imported before torch is known to be installed.
"""
