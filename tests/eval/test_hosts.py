"""Evaluators and batch decode on two processes with two devices each: the same numbers and the same file as on one.

Catches: sums of one host's rows reported, hosts that feed the same rows twice, outputs of the other host lost, two
writers, labels of the other host's rows taken for padding.
"""

import pathlib
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, pathlib, sys
os.environ.update(XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
import jax
me, hosts, port, tests, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], pathlib.Path(sys.argv[5])
if hosts > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize("127.0.0.1:" + port, hosts, me)
sys.path[:0] = [tests + "/infer", tests + "/eval"]
import test_evaluators as t
import test_predict as p
from jaxft.infer import batch_decode
sk, mesh, store = t.tiny.skeleton(), t.sharding.make_mesh(dict(data=-1, fsdp=1)), t.Store()
whole = lambda x: jax.make_array_from_callback(x.shape, t.sharding.replicated(mesh), lambda i: x[i])
params = jax.tree.map(whole, t.tiny.params(sk.shapes))
batches = t.pipeline.Batches(store, seed=0, batch=4, lengths=t.CAPS, pack=False, buckets=(), shuffle=False)
where = dict(mesh=mesh, rules=t.RULES)
quiet = dict(progress=lambda: lambda *a: None)
loss = t.evaluators.LossEvaluator("v", 0, skeleton=sk, batches=batches, loss_fn=t.loss_fn, **where, **quiet)
loss = loss.run(params, 0)
g = t.generate.Generator(sk, t.Words(), t.options.Options(length=5, eos=(1,), pad=0, start=0), batch=4, **where)
text = t.evaluators.GenerateEvaluator("g", 0, generator=g, store=store, names=("chrf",),
  samples=0, folder=None, **quiet)
text = text.run(params, 0)
rows = [dict(id=i, text=store.texts(i)[0]) for i in range(t.N)]
batch_decode.decode(g, params, rows, out, render=batch_decode.renderer(["{text}"], str.strip), about={})
told = []
for kind, grader, fn, outputs in (("classify", p.graders.Classes(("accuracy", "mcc"), p.CLASSES), p.entries, 3),
    ("tag", p.graders.Tags(("f1", "token_accuracy"), p.TAGS), p.tokens, 5)):
  e = p.predict.PredictEvaluator(kind, 0, predict=fn, grader=grader, loss=p.cross_entropy if outputs == 3 else None,
    batches=p.Batches(p.Store(), kind, 4, True), store=p.Store(), samples=5, folder=out.parent / f"samples{hosts}",
    **where, **quiet)
  told += e.run(whole(p.table(outputs)), 0).values()
print("RESULT", loss["loss"], loss["accuracy"], loss["tokens"], *text.values(), *told, flush=True)
"""


def run(hosts, out):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  tests = str(pathlib.Path(__file__).parents[1])
  env = {"PYTHONPATH": str(pathlib.Path(tests).parent), "PATH": "/usr/bin:/bin", "HOME": str(out.parent)}
  all_ = [
    subprocess.Popen(
      [sys.executable, "-c", SCRIPT, str(i), str(hosts), str(port), tests, str(out)],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(hosts)
  ]
  try:
    results = [p.communicate(timeout=240) for p in all_]
  finally:
    for p in all_:
      p.kill()
  lines = [[x for x in o.splitlines() if x.startswith("RESULT")] for o, _ in results]
  assert all(lines), results[-1][1][-2000:]
  return [[float(x) for x in line[0].split()[1:]] for line in lines]


def test_two_hosts_equal_one(tmp_path):
  (one,) = run(1, tmp_path / "one.jsonl")
  first, second = run(2, tmp_path / "two.jsonl")
  assert first == second == pytest.approx(one, rel=1e-6)
  assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
  assert not list(tmp_path.glob("*.parts"))
  names = {"classify-0.jsonl", "classify-0-confusion.json", "classify-confusion.png", "tag-0.jsonl"}
  for folder in ("samples1", "samples2"):
    assert {f.name for f in (tmp_path / folder).iterdir()} == names
  for name in names:
    assert (tmp_path / "samples1" / name).read_bytes() == (tmp_path / "samples2" / name).read_bytes()
