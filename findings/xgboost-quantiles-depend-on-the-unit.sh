#!/usr/bin/env bash
# Guess: trees for the 0.9 quantile (reg:quantileerror) of latencies find the same quantiles in
# microseconds as in seconds, and in each group of rows nine tenths are below what is predicted
# What happens: up to 3.3 a leaf was the quantile of its rows; 3.4 makes a step of a smoothed loss, whose
# scale is one for all rows and whose gains are held against a fixed number. Of labels around 0.001,
# milliseconds in seconds, 75 to 99 % of a group are below what 100 rounds predict; around 0.0001 no
# tree is grown, and all groups get one number. Where groups are a thousand times apart, all of the
# smallest is below, after 300 rounds too. reg:absoluteerror likewise. Scale the labels, or take logs
# Seen: xgboost 3.4.1 (3.3.0 and 3.0.5 give 0.90 everywhere), on a CPU, 2026-12-01
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.12 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    xgboost==3.4.1 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import numpy as np
import xgboost

draws = np.random.default_rng(0).exponential(1.0, 4000)
group = np.arange(4000) % 4


def below(labels):
    """Share of each group's labels that the predicted 0.9 quantile covers."""
    rows = group[:, None].astype(np.float32)
    rules = {"objective": "reg:quantileerror", "quantile_alpha": 0.9, "nthread": 1}
    trees = xgboost.train(rules, xgboost.DMatrix(rows, labels), 100)
    predicted = trees.predict(xgboost.DMatrix(rows))
    return [round(float((labels <= predicted)[group == i].mean()), 2) for i in range(4)]


times = draws + 3.0 * group
cases = {
    "labels around 10": times,
    "labels around 0.001": times * 1e-4,
    "labels around 0.0001": times * 1e-5,
    "groups ten times apart each": draws * 10.0**group,
}
found = {name: below(labels) for name, labels in cases.items()}
for name, shares in found.items():
    print(f"{name}: {shares} of the groups' labels are below their 0.9 quantile")
fine, small, smallest, apart = found.values()
kept = all(abs(share - 0.9) < 0.02 for share in fine)
raise SystemExit(
    0
    if kept
    and small[0] > 0.97
    and small[3] < 0.8
    and smallest[0] == 1
    and smallest[3] < 0.7
    and apart[0] > 0.97
    else 1
)
SEE
"$work/venv/bin/python" "$work/see.py"
