"""What the binaries share. Catches: a process that starts itself again for ever, or where it is none of the binaries; a
malloc without large pages where the kernel would give them."""

import importlib.machinery
import os
import sys
import types

import pytest

from jaxft import cli


@pytest.mark.parametrize(
  "module, kernel, before, after",
  [
    ("jaxft.main", "always [madvise] never", "", "glibc.malloc.hugetlb=1"),
    ("jaxft.main", "always [madvise] never", "glibc.a=2", "glibc.a=2:glibc.malloc.hugetlb=1"),
    ("jaxft.main", "always [madvise] never", "glibc.malloc.hugetlb=0", ""),  # so it was started again, or is not wanted
    ("jaxft.main", "[always] madvise never", "", ""),
    ("jaxft.main", None, "", ""),
    ("pytest.__main__", "always [madvise] never", "", ""),
    (None, "always [madvise] never", "", ""),
  ],
)
def test_large_pages(module, kernel, before, after, tmp_path, monkeypatch):
  started = []
  main = types.ModuleType("__main__")
  main.__spec__ = module and importlib.machinery.ModuleSpec(module, None)
  monkeypatch.setitem(sys.modules, "__main__", main)
  monkeypatch.setattr(cli, "LARGE_PAGES", tmp_path / "enabled")
  if kernel is not None:
    (tmp_path / "enabled").write_text(kernel)
  monkeypatch.setenv("GLIBC_TUNABLES", before)
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "jaxft.main", "--config=x.py"])
  monkeypatch.setattr(os, "execv", lambda *a: started.append((*a, os.environ["GLIBC_TUNABLES"])))
  cli._take_large_pages()
  command = [sys.executable, "-m", "jaxft.main", "--config=x.py"]
  assert started == ([(sys.executable, command, after)] if after else [])
