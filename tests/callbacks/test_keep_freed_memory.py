import sys

from lightning_kd.callbacks import keep_freed_memory as allocator


def test_glibc_takes_the_settings_and_other_systems_are_left_alone(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        @staticmethod
        def mallopt(option, value):
            calls.append((option, value))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    monkeypatch.setattr(sys, "platform", "linux")
    assert allocator.keep_freed_memory()
    assert calls == [(-3, 32 * 2**20), (-1, 2**31 - 1)]
    monkeypatch.delattr(Library, "mallopt")
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
