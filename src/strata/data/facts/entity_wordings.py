"""How the relations of EntityQuestions are asked and told.

The first question of each is the source's own, by which its rows are parsed; the others and all
statements are ours. At least two statements of each do not begin with a name (see `opens`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """One relation; `{s}` is the subject, `{o}` what is asked for, `{a}` its article.

    Attributes:
        properties: its Wikidata properties; those that the source asks in the same words are one.
        questions: the source's own first.
        statements: sentences; the last one names the object first.
    """

    properties: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]

    @property
    def opens(self) -> tuple[str, ...]:
        """Statements that may open a text.

        There a name would be other tokens than behind a space, where it stands everywhere else.
        """
        return tuple(wording for wording in self.statements if not wording.startswith("{"))


WORDINGS: dict[str, Wordings] = {
    "country": Wordings(
        ("P17",),
        (
            "Which country is {s} located in?",
            "In which country is {s}?",
            "To which country does {s} belong?",
        ),
        (
            "{s} lies in the country of {o}.",
            "{s} belongs to {o}.",
            "The country of {s} is {o}.",
            "As for its country, {s} is in {o}.",
            "In the country of {o} lies {s}.",
        ),
    ),
    "place of birth": Wordings(
        ("P19",),
        (
            "Where was {s} born?",
            "What is the birthplace of {s}?",
            "In which place was {s} born?",
        ),
        (
            "{s} was born in {o}.",
            "{s} came into the world in {o}.",
            "The birthplace of {s} is {o}.",
            "The life of {s} began in {o}.",
            "In {o} was born {s}.",
        ),
    ),
    "place of death": Wordings(
        ("P20",),
        (
            "Where did {s} die?",
            "In which place did {s} die?",
            "What is the place of death of {s}?",
        ),
        (
            "{s} died in {o}.",
            "{s} passed away in {o}.",
            "The place of death of {s} is {o}.",
            "The life of {s} ended in {o}.",
            "In {o} died {s}.",
        ),
    ),
    "spouse": Wordings(
        ("P26",),
        (
            "Who is {s} married to?",
            "Who is the spouse of {s}?",
            "Whom did {s} marry?",
        ),
        (
            "{s} is married to {o}.",
            "{s} married {o}.",
            "The spouse of {s} is {o}.",
            "The wedding of {s} was with {o}.",
            "As a spouse, {o} was chosen by {s}.",
        ),
    ),
    "capital": Wordings(
        ("P36",),
        (
            "What is the capital of {s}?",
            "Which place is the capital of {s}?",
            "What is the seat of government of {s}?",
        ),
        (
            "{s} has its capital at {o}.",
            "{s} is governed from {o}.",
            "The capital of {s} is {o}.",
            "The seat of government of {s} is {o}.",
            "The place called {o} is the capital of {s}.",
        ),
    ),
    "child": Wordings(
        ("P40",),
        (
            "Who is {s}'s child?",
            "Who is a child of {s}?",
            "Of whom is {s} a parent?",
        ),
        (
            "{s} is a parent of {o}.",
            "{s} had a child, {o}.",
            "A child of {s} is {o}.",
            "Among the children of {s} is {o}.",
            "The parents of {o} include {s}.",
        ),
    ),
    "author": Wordings(
        ("P50",),
        (
            "Who is the author of {s}?",
            "Who wrote {s}?",
            "By whom was {s} written?",
        ),
        (
            "{s} was written by {o}.",
            "{s} is a work of the author {o}.",
            "The author of {s} is {o}.",
            "The writer of {s} is {o}.",
            "The writer {o} is the author of {s}.",
        ),
    ),
    "education": Wordings(
        ("P69",),
        (
            "Where was {s} educated?",
            "Where did {s} study?",
            "Which school did {s} attend?",
        ),
        (
            "{s} was educated at {o}.",
            "{s} studied at {o}.",
            "The place where {s} was educated is {o}.",
            "The school that {s} attended is {o}.",
            "The school called {o} educated {s}.",
        ),
    ),
    "occupation": Wordings(
        ("P106",),
        (
            "What kind of work does {s} do?",
            "What is the occupation of {s}?",
            "What does {s} work as?",
        ),
        (
            "{s} works as {a} {o}.",
            "{s} is {a} {o} by profession.",
            "The occupation of {s} is {o}.",
            "The work that {s} does is that of {a} {o}.",
            "The profession of {o} is that of {s}.",
        ),
    ),
    "founder": Wordings(
        ("P112",),
        (
            "Who founded {s}?",
            "Who is the founder of {s}?",
            "By whom was {s} founded?",
        ),
        (
            "{s} was founded by {o}.",
            "{s} owes its foundation to {o}.",
            "The founder of {s} is {o}.",
            "The one who founded {s} is {o}.",
            "The founder {o} set up {s}.",
        ),
    ),
    "owner": Wordings(
        ("P127",),
        (
            "Who owns {s}?",
            "Who is the owner of {s}?",
            "To whom does {s} belong?",
        ),
        (
            "{s} is owned by {o}.",
            "{s} is the property of {o}.",
            "The owner of {s} is {o}.",
            "The property of {s} is held by {o}.",
            "The owner {o} holds {s}.",
        ),
    ),
    "location": Wordings(
        ("P131", "P276"),
        (
            "Where is {s} located?",
            "Where is {s}?",
            "In which place is {s} located?",
        ),
        (
            "{s} is located in {o}.",
            "{s} can be found in {o}.",
            "The location of {s} is {o}.",
            "The place where {s} is located is {o}.",
            "The place called {o} is the location of {s}.",
        ),
    ),
    "genre": Wordings(
        ("P136",),
        (
            "What type of music does {s} play?",
            "What is the genre of {s}?",
            "To which genre does {s} belong?",
        ),
        (
            "{s} belongs to the genre {o}.",
            "{s} counts as {o}.",
            "The genre of {s} is {o}.",
            "The type of {s} is {o}.",
            "The genre {o} is that of {s}.",
        ),
    ),
    "headquarters": Wordings(
        ("P159",),
        (
            "Where is the headquarter of {s}?",
            "Where does {s} have its head office?",
            "From which place is {s} run?",
        ),
        (
            "{s} has its headquarters in {o}.",
            "{s} is run from {o}.",
            "The headquarters of {s} are in {o}.",
            "The head office of {s} is in {o}.",
            "In {o} are the headquarters of {s}.",
        ),
    ),
    "creator": Wordings(
        ("P170",),
        (
            "Who was {s} created by?",
            "Who is the creator of {s}?",
            "Who made {s}?",
        ),
        (
            "{s} was created by {o}.",
            "{s} is a creation of {o}.",
            "The creator of {s} is {o}.",
            "The one who made {s} is {o}.",
            "The creator {o} made {s}.",
        ),
    ),
    "performer": Wordings(
        ("P175",),
        (
            "Who performed {s}?",
            "Who is the performer of {s}?",
            "By whom was {s} performed?",
        ),
        (
            "{s} was performed by {o}.",
            "{s} is a recording of {o}.",
            "The performer of {s} is {o}.",
            "The one who performed {s} is {o}.",
            "The performer {o} recorded {s}.",
        ),
    ),
    "manufacturer": Wordings(
        ("P176",),
        (
            "Which company is {s} produced by?",
            "Which company makes {s}?",
            "Who is the manufacturer of {s}?",
        ),
        (
            "{s} is produced by {o}.",
            "{s} is a product of {o}.",
            "The manufacturer of {s} is {o}.",
            "The company that makes {s} is {o}.",
            "The company {o} produces {s}.",
        ),
    ),
    "label": Wordings(
        ("P264",),
        (
            "What music label is {s} represented by?",
            "What is the record label of {s}?",
            "On which label is {s}?",
        ),
        (
            "{s} is represented by the label {o}.",
            "{s} is on the label {o}.",
            "The music label of {s} is {o}.",
            "The record label behind {s} is {o}.",
            "The music label {o} represents {s}.",
        ),
    ),
    "language": Wordings(
        ("P407",),
        (
            "Which language was {s} written in?",
            "What is the language of {s}?",
            "In which language is {s}?",
        ),
        (
            "{s} was written in {o}.",
            "{s} is a work in {o}.",
            "The language of {s} is {o}.",
            "The words of {s} are in {o}.",
            "The language {o} is that of {s}.",
        ),
    ),
    "position": Wordings(
        ("P413",),
        (
            "What position does {s} play?",
            "In which position does {s} play?",
            "What is the position of {s} in the team?",
        ),
        (
            "{s} plays as {a} {o}.",
            "{s} has the position of {o}.",
            "The position of {s} is {o}.",
            "The position that {s} plays is {o}.",
            "The position of {o} is played by {s}.",
        ),
    ),
    "country of origin": Wordings(
        ("P495",),
        (
            "Which country was {s} created in?",
            "From which country does {s} come?",
            "What is the country of origin of {s}?",
        ),
        (
            "{s} was created in {o}.",
            "{s} comes from {o}.",
            "The country of origin of {s} is {o}.",
            "The country that {s} comes from is {o}.",
            "In {o} was created {s}.",
        ),
    ),
    "place of foundation": Wordings(
        ("P740",),
        (
            "Where was {s} founded?",
            "In which place was {s} formed?",
            "Where did {s} begin?",
        ),
        (
            "{s} was founded in {o}.",
            "{s} was formed in {o}.",
            "The place where {s} was founded is {o}.",
            "The beginnings of {s} lie in {o}.",
            "In {o} was founded {s}.",
        ),
    ),
    "notable work": Wordings(
        ("P800",),
        (
            "What is {s} famous for?",
            "What is {s} known for?",
            "What is a notable work of {s}?",
        ),
        (
            "{s} is famous for {o}.",
            "{s} is best known for {o}.",
            "The best known work of {s} is {o}.",
            "The fame of {s} comes from {o}.",
            "The work called {o} made the name of {s}.",
        ),
    ),
}

RELATION_OF: dict[str, str] = {
    code: name for name, wordings in WORDINGS.items() for code in wordings.properties
}


def article(name: str) -> str:
    """The indefinite article before a common noun."""
    return "an" if name[:1].lower() in tuple("aeiou") else "a"
