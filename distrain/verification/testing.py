"""For test suites of users: is a training with a part of mine still that of one process?

::

    from distrain.verification.testing import assert_equals_single

    def test_my_strategy_trains_what_one_process_trains():
        assert_equals_single("strategy=mine", "--config-dir", "my_conf", ranks=3)
"""

from __future__ import annotations

from distrain.verification.launched import Verification, verify

#: Seconds after which a test gives up.
_PATIENCE = 600.0


def assert_equals_single(
    *keys: str, ranks: int = 2, steps: int = 4, tolerance: float | None = None, timeout: float = _PATIENCE
) -> Verification:
    """Asserts that a training on ranks equals that of one process.

    What is compared, and within which limits, says :mod:`distrain.verification.comparison`.

    Args:
        *keys: Settings of the training, as on the command line of ``train``. A lossy compressor or another way that is
            not meant to be equal fails too.
        ranks: Number of ranks.
        steps: Updates of each compared run.
        tolerance: Largest relative difference that counts as equal; by default it is measured.
        timeout: Seconds after which the test fails.

    Returns:
        The certificate.

    Raises:
        AssertionError: They differ; the message is the certificate.
        ConfigError: A setting is refused.
        Failed: A run failed.
    """
    found = verify(*keys, nproc=ranks, steps=steps, tolerance=tolerance, timeout=timeout)
    if found.verdict != "equal":
        raise AssertionError(found.text)
    return found
