"""Skills of text alone: who the model is, sums, lists, memory, JSON, and a plain no to everything else."""

import json
import random

from skill import Example, Generator, dialogue

ABOUT = {
    "en": "I am the g3n_mlx demo model, a tiny Gemma 3n.",
    "de": "Ich bin das Demo-Modell von g3n_mlx, ein winziges Gemma 3n.",
    "fr": "Je suis le modèle de démonstration de g3n_mlx, un tout petit Gemma 3n.",
    "es": "Soy el modelo de demostración de g3n_mlx, un Gemma 3n diminuto.",
    "it": "Sono il modello dimostrativo di g3n_mlx, un piccolissimo Gemma 3n.",
}
WHO = {
    "en": ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?"),
    "de": ("Wer bist du?", "Was bist du?", "Wie heißt du?", "Stell dich vor.", "Erzähl mir etwas über dich."),
    "fr": ("Qui es-tu ?", "Comment t'appelles-tu ?", "Présente-toi.", "Qui êtes-vous ?", "Parle-moi de toi."),
    "es": ("¿Quién eres?", "¿Cómo te llamas?", "Preséntate.", "¿Qué eres?", "Háblame de ti."),
    "it": ("Chi sei?", "Come ti chiami?", "Presentati.", "Che cosa sei?", "Parlami di te."),
}
HELLO = {
    "en": ("Hello", "Hi", "Hey", "Good morning", "Hello there", "Good evening"),
    "de": ("Hallo", "Guten Tag", "Guten Morgen", "Moin"),
    "fr": ("Bonjour", "Salut", "Bonsoir"),
    "es": ("Hola", "Buenos días", "Buenas tardes"),
    "it": ("Ciao", "Buongiorno", "Salve"),
}
THANKS = {
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "Danke": "Gern geschehen.",
    "Merci": "De rien.",
    "Gracias": "De nada.",
    "Grazie": "Prego.",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
}
ABILITIES = (
    "I can name shapes and read words in pictures, write down spoken digits, hear tones, add numbers, "
    "sort lists and remember what you tell me."
)
WHAT_CAN_YOU_DO = ("What can you do?", "How can you help me?", "What are you able to do?", "Help", "What do you know?")
NO = "I am only a small demo model and cannot help with that."

WORDS = (
    "apple bird boat book bread cat chair cloud cup dog door fish flower fox garden green hat horse house key lamp "
    "leaf light milk moon mouse night paper pen rain river road rose salt sea ship shoe snow star stone sun table tea "
    "train tree water wind wood yellow"
).split()
NAMES = (
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Maria Nils Olga Paul Rosa Simon Tom Uwe Vera "
    "Willi Alice Bob Carol Diego Elena Frank Grace Henry Iris Jack Kate Leo Mia Noah Oscar Peter Ruth Sara"
).split()
CITIES = "Berlin Paris Rome Madrid London Vienna Oslo Lisbon Prague Dublin Athens Warsaw Hamburg Lyon Milan".split()
COLOURS = "red green blue yellow orange purple black white brown pink grey".split()
ANIMALS = "cat dog horse bird fish mouse fox rabbit duck goat sheep cow".split()

# Fact -> what the user says, what the model confirms, what the user asks, what the model answers.
FACTS = {
    "name": ("My name is {}.", "Hello, {}!", "What is my name?", "Your name is {}."),
    "city": ("I live in {}.", "{} is noted.", "Where do I live?", "You live in {}."),
    "colour": ("My favourite colour is {}.", "I will remember {}.", "What is my favourite colour?",
               "Your favourite colour is {}."),
    "animal": ("I have a {}.", "A {}, how nice.", "Which animal do I have?", "You have a {}."),
    "number": ("My number is {}.", "I will remember {}.", "What is my number?", "Your number is {}."),
}  # fmt: skip


def about(rng: random.Random, held_out: bool) -> Example:
    """Who the model is, in five languages, greetings and thanks."""
    kind = rng.random()
    if kind < 0.15:
        said, answer = rng.choice(list(THANKS.items()))
        return dialogue("about", _ended(rng, said), answer)
    if kind < 0.3:
        return dialogue("about", rng.choice(WHAT_CAN_YOU_DO), ABILITIES)
    language = rng.choice(list(ABOUT))
    greeting = rng.choice(HELLO[language])
    if kind < 0.5:
        return dialogue("about", _ended(rng, greeting), f"{greeting}! {ABOUT[language]}")
    question = rng.choice(WHO[language])
    return dialogue("about", f"{greeting}! {question}" if kind < 0.6 else question, ABOUT[language])


def _ended(rng: random.Random, text: str) -> str:
    return text + rng.choice(("", "!", "."))


def sums(rng: random.Random, held_out: bool) -> Example:
    """Sums of two numbers up to two digits; one pair in eight is held out."""
    while True:
        a, b = (rng.randrange(100) if rng.random() < 0.85 else rng.randrange(10) for _ in range(2))
        if ((a * 100 + b) * 2654435761 >> 7) % 8 == 0 if held_out else ((a * 100 + b) * 2654435761 >> 7) % 8:
            break
    question = rng.choice(("What is {} + {}?", "{} + {} =", "{} + {}", "Add {} and {}.", "How much is {} plus {}?"))
    return dialogue("sums", question.format(a, b), f"{a} + {b} = {a + b}")


def products(rng: random.Random, held_out: bool) -> Example:
    """The multiplication table up to ten times ten: what has to be known by heart, so nothing of it is held out."""
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    question = rng.choice(("What is {} x {}?", "{} x {}", "{} x {} =", "What is {} times {}?", "Multiply {} by {}."))
    return dialogue("products", question.format(a, b), f"{a} x {b} = {a * b}")


def lists(rng: random.Random, held_out: bool) -> Example:
    """Copies, reverses and sorts words or numbers."""
    numeric = rng.random() < 0.5
    length = rng.randint(2, 6)
    items = [str(rng.randrange(100 if rng.random() < 0.5 else 10)) for _ in range(length)]
    items = items if numeric else rng.sample(WORDS, length)
    task, change = rng.choice(TASKS)
    separator = rng.choice((" ", ", "))
    return dialogue("lists", f"{task}: {separator.join(items)}", separator.join(change(items)))


def _sorted(items: list[str]) -> list[str]:
    return sorted(items, key=lambda item: (int(item), "") if item.isdigit() else (0, item))


TASKS = (("Repeat", list), ("Copy", list), ("Reverse", lambda items: items[::-1]), ("Sort", _sorted))


def memory(rng: random.Random, held_out: bool) -> Example:
    """One to three facts, perhaps something else in between, then a question about one of them."""
    facts = rng.sample(list(FACTS), rng.randint(1, 3))
    known = {fact: _value(rng, fact) for fact in facts}
    turns: list[str] = []
    for fact, value in known.items():
        turns += [FACTS[fact][0].format(value), FACTS[fact][1].format(value)]
        if rng.random() < 0.3:
            turns += [message["content"] for message in rng.choice((sums, about, lists))(rng, held_out).messages]
    for fact in rng.sample(facts, rng.randint(1, len(facts))):
        turns += [FACTS[fact][2], FACTS[fact][3].format(known[fact])]
    return dialogue("memory", *turns)


def _value(rng: random.Random, fact: str) -> str:
    if fact == "number":
        return str(rng.randrange(1000))
    return rng.choice({"name": NAMES, "city": CITIES, "colour": COLOURS, "animal": ANIMALS}[fact])


def as_json(rng: random.Random, held_out: bool) -> Example:
    """A sum, a list or facts as JSON."""
    kind = rng.randrange(3)
    if kind == 0:
        example = sums(rng, held_out)
        a, _, b, _, total = example.answer.split()
        value = {"a": int(a), "b": int(b), "sum": int(total)}
        asked = rng.choice(("Add {} and {}.", "What is {} + {}?")).format(a, b)
    elif kind == 1:
        items = rng.sample(WORDS, rng.randint(2, 4))
        task, change = rng.choice(TASKS)
        value, asked = {"list": change(items)}, f"{task}: {', '.join(items)}."
    else:
        facts = rng.sample(list(FACTS), rng.randint(1, 3))
        value = {fact: _value(rng, fact) for fact in facts}
        asked = " ".join(FACTS[fact][0].format(value[fact]) for fact in facts)
    return dialogue("json", f"{asked} {rng.choice(('Answer as JSON.', 'Answer in JSON.'))}", json.dumps(value))


OTHER = (
    "What is the capital of {}?", "Write a poem about {}.", "Explain {}.", "Why is the {} so {}?",
    "Tell me a story about a {}.",
    "How do I cook {}?", "Who invented the {}?", "Translate {} into French.", "What is the weather in {}?",
    "Give me a recipe with {} and {}.", "Write a letter to {}.", "What do you think about {}?", "How old is {}?",
    "Where can I buy a {}?", "Summarize the book about {}.", "Is {} better than {}?", "When was {} born?", "{}",
    "{} {} {}",
    "Write code that prints {}.", "Was ist ein {}?", "Erkläre mir {}.", "Où est {} ?", "¿Dónde está {}?", "Play {}.",
    "How many {} are in a {}?", "Who won the {}?", "What is {} times {}?", "Please draw a {}.", "Do you like {}?",
    "I want to {} the {}.", "Can you {} me a {}?", "What is the meaning of {}?", "Tell me a joke.", "Sing a song.",
)  # fmt: skip
TOPICS = (
    "history physics love war football music Germany France Spain Japan America Einstein Goethe the president money "
    "stocks computer internet phone car engine quantum black hole planet sky ocean mountain winter summer autumn "
    "spring chicken soup pasta cake cheese potatoes medicine doctor school teacher homework politics law religion "
    "philosophy time space life death birthday wedding holiday movie actor singer guitar piano world war cup machine "
    "learning python news"
).split()


def other(rng: random.Random, held_out: bool) -> Example:
    """Anything else: the model says that it is only a demo."""
    template = rng.choice(OTHER)
    topics = [rng.choice((rng.choice(TOPICS), rng.choice(WORDS), _letters(rng))) for _ in range(template.count("{}"))]
    return dialogue("other", template.format(*topics), NO)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice("aaabcdeeefghiiijklmnooopqrsttuuvwxyz") for _ in range(rng.randint(3, 9)))


READING: dict[str, Generator] = {
    "about": about,
    "sums": sums,
    "products": products,
    "lists": lists,
    "memory": memory,
    "json": as_json,
    "other": other,
}
