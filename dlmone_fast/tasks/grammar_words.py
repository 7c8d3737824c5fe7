"""The words of the grammar task: each belongs to one slot of one side, so parsing is exact.

Source words and their paraphrases stand side by side. Registers are 0 (formal), 1 (informal).
"""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """Split a line of words."""
    return text.split()


AGENTS = listed(
    "nurse baker farmer pilot teacher sailor doctor singer lawyer miner painter tailor "
    "waiter driver dancer banker plumber hunter barber student soldier butcher gardener chemist"
)

# source: formal, informal
VERBS = {
    "repairs": ("restore", "fix"),
    "buys": ("purchase", "grab"),
    "moves": ("transport", "haul"),
    "cleans": ("sanitise", "scrub"),
    "hides": ("conceal", "stash"),
    "breaks": ("damage", "smash"),
    "sells": ("vend", "flog"),
    "finds": ("discover", "spot"),
    "needs": ("require", "want"),
    "shows": ("display", "flaunt"),
    "steals": ("appropriate", "nick"),
    "throws": ("discard", "chuck"),
    "borrows": ("requisition", "scrounge"),
    "checks": ("inspect", "eyeball"),
    "carries": ("convey", "lug"),
    "keeps": ("retain", "hoard"),
}

ADJECTIVES = {
    "big": "large",
    "small": "tiny",
    "old": "ancient",
    "new": "modern",
    "red": "crimson",
    "blue": "azure",
    "shiny": "gleaming",
    "broken": "faulty",
    "heavy": "weighty",
    "cheap": "inexpensive",
    "strange": "odd",
    "pretty": "lovely",
    "wet": "soggy",
    "dirty": "grimy",
    "quick": "fast",
    "round": "circular",
}

OBJECTS = {
    "lamp": "lantern",
    "sofa": "couch",
    "cup": "mug",
    "bag": "sack",
    "coat": "jacket",
    "car": "automobile",
    "boat": "vessel",
    "stone": "rock",
    "knife": "blade",
    "box": "crate",
    "picture": "photograph",
    "bottle": "flask",
    "rug": "carpet",
    "bucket": "pail",
    "phone": "handset",
    "bike": "bicycle",
    "table": "desk",
    "hat": "cap",
    "book": "volume",
    "gate": "door",
    "pan": "skillet",
    "rope": "cord",
    "seat": "chair",
    "mirror": "reflector",
}

PLACES = listed(
    "garage kitchen garden market station office harbour library museum school factory castle "
    "forest village cellar theatre"
)

TIMES = listed("today tonight tomorrow soon later now daily weekly monthly monday friday sunday")

# register: two ways to open, one auxiliary, two ways to close
OPENINGS = (("indeed", "certainly"), ("hey", "yo"))
AUXILIARIES = ("shall", "gonna")
CLOSINGS = (("respectfully", "sincerely"), ("mate", "buddy"))
