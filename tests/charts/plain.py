"""The manifests of `k8s/` for those who don't use helm, made from the chart. `make k8s` writes them.

`k8s/base` is the chart with `base-values.yaml`; `k8s/keda` is what KEDA needs besides.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.charts import rendering
from tests.charts.rendering import ROOT

K8S = ROOT / "k8s"
NAMESPACE = "taskqueue"
_HEAD = "# Written by `make k8s` from charts/taskqueue, and compared with it by a test: change the chart.\n"
_SEPARATOR = "---\n# Source: "


def manifests() -> Mapping[Path, str]:
    """What each file should say."""
    base = _documents(K8S / "base-values.yaml")
    scaled = _documents(K8S / "base-values.yaml", K8S / "keda-values.yaml")
    keda = [one for one in scaled if "\napiVersion: keda.sh/" in one]
    return {
        K8S / "base" / "taskqueue.yaml": _HEAD + "".join(base),
        K8S / "keda" / "scaling.yaml": _HEAD + "".join(keda),
    }


def _documents(*values: Path) -> list[str]:
    text = rendering.text({}, *values, release="taskqueue", namespace=NAMESPACE)
    # Those who apply it with kubectl should not be told that helm manages it.
    text = "".join(line for line in text.splitlines(keepends=True) if "app.kubernetes.io/managed-by:" not in line)
    return [_SEPARATOR + one for one in text.split(_SEPARATOR)[1:]]


def main() -> None:
    """Write all of them."""
    for file, text in manifests().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        sys.stdout.write(f"{file.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
