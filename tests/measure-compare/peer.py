# Asks sev-snp-measure for many answers in one process.
#
# Standard input: one JSON object {"guests": [...], "repeat": N, "id_blocks": [...]}. Standard output: one
# {"signatures": {name: number}, "digests": [...], "seconds": [...], "id_blocks": [...]}. A digest is hex, or
# {"refused": why}; "seconds" is the best time of N runs of each guest.
import json
import os
import sys
import tempfile
import time

from sevsnpmeasure import guest, id_block, vcpu_types
from sevsnpmeasure.sev_mode import SevMode


def measure(it):
    return guest.calc_launch_digest(
        SevMode.from_str(it["mode"]), it["vcpus"], it["vcpu_signature"], it["ovmf"], it["kernel"], it["initrd"],
        it["append"], it["guest_features"]).hex()


def answer(it, repeat):
    best = None
    for _ in range(repeat):
        start = time.perf_counter()
        try:
            digest = measure(it)
        except Exception as why:
            return {"refused": f"{type(why).__name__}: {why}"}, None
        spent = time.perf_counter() - start
        best = spent if best is None else min(best, spent)
    return digest, best


def sign(it):
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for which in ("id_key", "author_key"):
            names.append(os.path.join(folder, which))
            with open(names[-1], "w") as key:
                key.write(it[which])
        return id_block.snp_calc_id_block(bytes.fromhex(it["digest"]), *names)


asked = json.load(sys.stdin)
answers = [answer(it, asked["repeat"]) for it in asked["guests"]]
json.dump({
    "signatures": vcpu_types.CPU_SIGS,
    "digests": [digest for digest, _ in answers],
    "seconds": [seconds for _, seconds in answers],
    "id_blocks": [sign(it) for it in asked["id_blocks"]],
}, sys.stdout)
