from fedpeat.core import peak_gpu_mib, peak_rss_mib


def test_the_peak_sees_a_large_allocation():
    before = peak_rss_mib()
    block = bytearray(int((before + 64) * 2**20) - int(before * 2**20))
    block[::4096] = b"x" * len(block[::4096])
    assert 10 < before <= peak_rss_mib() < 100_000
    assert peak_gpu_mib() >= 0
