"""Neighbors of many pictures on random features: seconds and peak memory of retrieval at paper size and above.

The features have the shape of a real set (a few thousand centers with pictures around them), so that many cosines are above
delta. Two numbers are not about neighbors and are printed apart: the clusters, and the greedy matching.
"""
import argparse
import resource
import time

import torch

from unify_rl.data.pairs import cluster, greedy, neighbors, ranked_members, unit


def features(n: int, d: int, centers: int, spread: float, g: torch.Generator) -> torch.Tensor:
    "Unit vectors around common centers, made in blocks."
    middle = unit(torch.randn(centers, d, generator=torch.Generator().manual_seed(0)))
    out = torch.empty(n, d)
    for a in range(0, n, 8192):
        b = min(a + 8192, n)
        noise = torch.randn(b - a, d, generator=g) * (spread / d ** 0.5)
        out[a:b] = unit(middle[torch.randint(centers, (b - a,), generator=g)] + noise)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--und", type=int, default=100_000, help="understanding pictures (default: %(default)s)")
    p.add_argument("--gen", type=int, default=60_000, help="generation pictures (default: %(default)s)")
    p.add_argument("--dim", type=int, default=512, help="feature dimensions (default: %(default)s; ResNet-50 has 2048)")
    p.add_argument("--neighbors", type=int, default=10)
    p.add_argument("--delta", type=float, default=0.6)
    p.add_argument("--clusters", type=int, default=0, help="also time this many clusters over both sides (default: none)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    g = torch.Generator().manual_seed(1)
    x_UD, x_GD = (features(n, a.dim, 2000, 0.7, g) for n in (a.und, a.gen))

    def timed(what, job):
        wall, cpu = time.perf_counter(), time.process_time()
        out = job()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:34} {time.perf_counter() - wall:8.1f} s {time.process_time() - cpu:8.1f} CPU s   peak {peak:.2f} GB", flush=True)
        return out

    print(f"{a.gen} x {a.und} pictures, {a.dim} dimensions, n = {a.neighbors}, {a.threads} thread(s), torch {torch.__version__}")
    timed("(features alone)", lambda: None)
    near = timed("neighbors", lambda: neighbors(x_GD, x_UD, a.neighbors))
    pairs = timed("greedy matching", lambda: greedy(*near, a.delta))
    print(f"{len(pairs)} pairs above {a.delta}; {2 * a.und * a.gen * a.dim / 1e12:.1f} TFLOP in the products")
    if a.clusters:
        x_ND = torch.cat([x_UD, x_GD])
        timed(f"{a.clusters} clusters and their medoids", lambda: ranked_members(x_ND, *cluster(x_ND, a.clusters)))


if __name__ == "__main__": main()
