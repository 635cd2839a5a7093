"""How much may what is shared tell of a client?

Accounting of client-level differential privacy, by the library `dp-accounting` (the optional extra `dp`), imported
where a number is asked for. Functions of numbers alone: clipping and noise are `strategies/privacy.py`.

To add one more way to sample clients: its event in `accounting.py`, and whom its guarantee compares.
"""

from fedpeat.privacy.accounting import Sampling, check_installed, delta_noise, epsilon_after, noise_multiplier_for

__all__ = ["Sampling", "check_installed", "delta_noise", "epsilon_after", "noise_multiplier_for"]
