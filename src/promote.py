"""Say which version of Production_Reg is behind prod and how it came there, or change it.

Without options, all versions and all changes are listed. A version that a person moves prod away
from, or past, is set aside: evaluations give it prod no more, until a person does.
"""

from defect_detection import promotion, registry, script, settings, tracking
from defect_detection.promotion import Change, Recorded
from defect_detection.registry import PRODUCTION_ALIAS, Version
from defect_detection.settings import Config


def main() -> None:
    """Settings; then list, choose or roll back."""
    parser = script.parser(
        __doc__, "python src/promote.py --rollback --why 'misses cracks on line 3'", data=False
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list versions and changes (default)")
    what.add_argument("--version", type=int, metavar="N", help="give prod to version N")
    what.add_argument("--rollback", action="store_true", help="give prod to the version before")
    parser.add_argument("--why", metavar="TEXT", help="the reason, which is recorded")
    options = parser.parse_args()
    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    name = config.mlflow.production_model_name

    with tracking.connected(settings.tracking_uri(env)):
        by = promotion.whoever(env)
        if options.version is not None:
            why = options.why or "chosen"
            print(said(name, promotion.choose(name, options.version, why, by)))
        elif options.rollback:
            print(said(name, promotion.roll_back(name, options.why or "rolled back", by)))
        else:
            behind = registry.behind_alias(name, PRODUCTION_ALIAS)
            print(versions_table(name, registry.versions(name), behind))
            print(changes_table(promotion.history(name)))


def said(name: str, change: Change) -> str:
    """Say a change in a line or two."""
    done = f"{PRODUCTION_ALIAS} of {name} is version {change.after}, was {change.before or 'none'}"
    if change.set_aside:
        done += f"\nset aside until a person chooses them: {', '.join(map(str, change.set_aside))}"
    return done


def versions_table(name: str, versions: list[Version], behind: Version | None) -> str:
    """Lay the versions out, the one behind prod marked."""
    lines = [name, "  version  test accuracy  on unseen  test pictures  state"]
    for version in reversed(versions):
        here = behind is not None and version.number == behind.number
        state = [PRODUCTION_ALIAS] if here else []
        state += ["set aside"] if version.set_aside else []
        state += [] if version.qualified else ["not better beyond chance"]
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
    """Lay the changes of the alias out, the newest first."""
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
    script.run(main)
