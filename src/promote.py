"""Show which version of Production_Reg has the alias prod and why, or change it.

Without options, all versions and all changes are listed. A version that a person moves prod away
from, or past, is set aside: evaluations do not give it prod again, only a person does.
"""

from defect_detection import cli, settings
from defect_detection.registry import promotion, runs, store, versions
from defect_detection.registry.promotion import Change, Recorded
from defect_detection.registry.versions import PRODUCTION_ALIAS, Version


def main() -> None:
    """Read options and settings; then list, choose or roll back."""
    parser = cli.parser(
        __doc__, "python src/promote.py --rollback --why 'misses cracks on line 3'", data=False
    )
    parser.add_argument("--config", metavar="FILE", help="instead of src/config.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list versions and changes (default)")
    what.add_argument("--version", type=int, metavar="N", help="give prod to version N")
    what.add_argument("--rollback", action="store_true", help="give prod to the version before")
    parser.add_argument("--why", metavar="TEXT", help="the reason, which is recorded")
    options = parser.parse_args()
    env = settings.environment()
    config = settings.read_config(options.config)
    name, cache = config.names.production_model_name, settings.from_root(config.paths.cache)

    uri = settings.tracking_uri(env)
    with store.patience(), store.connected(uri), runs.watched(cache):
        promotion.check_record(name)
        by = promotion.actor(env)
        if options.version is not None:
            why = options.why or "chosen"
            print(describe(name, promotion.choose(name, options.version, why, by)))
        elif options.rollback:
            print(describe(name, promotion.roll_back(name, options.why or "rolled back", by)))
        else:
            production = versions.in_production(name)
            print(versions_table(name, versions.with_accuracy(name), production))
            print(changes_table(promotion.history(name)))


def describe(name: str, change: Change) -> str:
    """Return a change in a line or two."""
    done = f"{PRODUCTION_ALIAS} of {name} is version {change.after}, was {change.before or 'none'}"
    if change.set_aside:
        done += f"\nset aside until a person chooses them: {', '.join(map(str, change.set_aside))}"
    return done


def versions_table(name: str, known: list[Version], production: Version | None) -> str:
    """Return a table of the versions, the one in production marked."""
    lines = [name, "  version  test accuracy  on unseen  test images  state"]
    for version in reversed(known):
        here = production is not None and version.number == production.number
        state = [PRODUCTION_ALIAS] if here else []
        state += ["set aside"] if version.set_aside else []
        state += [] if version.qualified else ["not significantly better"]
        state += [] if version.released else [f"not released: {version.why_not_released}"]
        try:
            unseen = f"{float(version.tags['acc_unseen']):.4f}"
        except (KeyError, ValueError):
            unseen = "unknown"
        lines.append(
            f"{'*' if here else ' '} {version.number:7}  {version.acc:13.4f}  {unseen:>9}  "
            f"{(version.test_digest or 'unknown')[:12]:13}  {', '.join(state)}"
        )
    return "\n".join(line.rstrip() for line in lines)


def changes_table(history: list[Recorded]) -> str:
    """Return a table of the changes of the alias, the newest first."""
    lines = [f"\nChanges of {PRODUCTION_ALIAS}, the newest first"]
    for recorded in history:
        change = recorded.change
        why = " ".join(change.why.split())  # one line each, whatever a person wrote
        outcome = "" if recorded.done else "  NOT CARRIED OUT"
        lines.append(
            f"  {change.at}  {change.before or 'none'} -> {change.after}  {why}  "
            f"by {change.by}  commit {recorded.commit[:12]}{outcome}"
        )
    return "\n".join(lines if history else [*lines, "  none"])


if __name__ == "__main__":
    cli.run(main)
