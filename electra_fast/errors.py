"""The form of every error message of this package: the rule, the value, and the remedy."""


def must(subject: str, rule: str, got: object, remedy: str = "") -> str:
    """Return "<subject> must <rule>, got <got>; <remedy>".

    Args:
        subject: the call and the argument: "embed: ids", "pretrain: --seq".
        rule: what must hold: "be 1 or more".
        got: what was found instead; it is inserted unchanged, so pass ``repr(text)`` for quotes.
        remedy: what to do about it; left out if empty.
    """
    message = f"{subject} must {rule}, got {got}"
    return f"{message}; {remedy}" if remedy else message
