"""The limits that control groups, version 1 or 2, set to this process."""

from pathlib import Path, PurePosixPath


def read_limits(controller: str, *names: str, root: Path = Path("/")) -> list[list[str]]:
    """The words in the files `names`, for every group around this process that has all of them.

    A group's limit holds for all groups inside it, so the least of the answers is the one that counts.
    """
    limits = []
    for folder in _groups(controller, root):
        try:
            limits.append([word for name in names for word in (folder / name).read_text().split()])
        except OSError:  # the root group has no limits, and a container does not show its outer groups
            continue
    return limits


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of the groups this process is in, each followed by those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in lines:  # "0::/job/step" in version 2, "4:cpu,cpuacct:/job/step" in version 1
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        inner = PurePosixPath(group.lstrip("/"))
        folders += [top / part for part in (inner, *inner.parents)]
    return folders
