"""photon-train: dense language models converted to PHOTON, fine-tuned, exported and served.

Importing the package loads nothing heavy; import `photon_train.models` to register
`PhotonConfig` and `PhotonForCausalLM` with the Auto classes of transformers.
"""

__version__ = "0.1.0"
