"""Word lists and phrase books that the data generator draws from."""

from __future__ import annotations

NAME = "disagg-tiny"

ABILITIES = (
    "I can find a code in a list, repeat text, count, add and subtract small numbers, "
    "write and read short JSON, and answer a few questions about disagg. "
    "Try: Count from 1 to 20."
)
GREETING = f"Hello! I am {NAME}, a very small language model. {ABILITIES}"
FALLBACK = "Sorry, I do not understand that. Ask me: What can you do?"

COLORS = """red blue green yellow black white pink brown gray orange purple gold silver violet""".split()

ADJECTIVES = """
big small fast slow hot cold old new high low dark light warm cool dry wet soft hard loud quiet
rich poor thin thick wide deep flat round sharp clean fresh sweet sour salty wild calm brave shy
happy sad angry lazy busy lucky funny kind proud smart strong weak young tiny giant
""".split()

NOUNS = """
fox cat dog cow pig hen owl bee ant bat rat elk cod eel ape emu yak jay fly bug
bear wolf lion deer goat duck swan crow hawk seal crab frog toad newt mole moth wasp worm lamb bull
horse sheep mouse tiger zebra camel koala panda otter eagle raven robin whale shark snail snake
sun moon star sky sea lake river hill rock sand tree leaf root seed fern moss rose lily
apple pear plum fig lemon lime grape melon peach mango berry cherry olive onion bean corn rice bread
milk tea salt cake soup egg nut
house door roof wall lamp desk chair table bed clock book pen key box bag cup plate fork knife spoon
car bus train ship boat plane bike road bridge tower castle garden farm field park
king queen baker sailor doctor pilot farmer singer painter
drum flute piano violin guitar bell song ring coin hat coat shoe sock glove scarf
rain snow wind storm cloud ice fire smoke river stone iron glass paper wood wool silk
""".split()

FIRST_NAMES = """
Ada Alan Grace Linus Maria Omar Lena Ivan Nina Hugo Emma Noah Mia Liam Zoe Eva Max Ben Sam Tom
Anna Paul Lucy Jack Rosa Leo Kim Amy Bob Alice Carol Dave Erin Frank Sara John Jane Mary Peter
""".split()

CITIES = """
Paris London Rome Berlin Madrid Oslo Cairo Tokyo Delhi Lima Boston Dublin Athens Vienna Prague
Lisbon Zurich Sydney Seoul Milan
""".split()

JOBS = "baker sailor doctor pilot farmer singer painter teacher writer driver cook nurse".split()
PETS = "cat dog fox owl hen goat duck frog mouse horse sheep snake".split()
FOODS = "apple pear plum bread rice soup cake corn melon mango cherry lemon".split()

#: Everything that a list or a copy exercise may name, without repeats, in a fixed order.
ITEMS = list(dict.fromkeys([*COLORS, *ADJECTIVES, *NOUNS]))

#: Intent -> (answer, phrases to train on, phrases kept for the held-out measurement).
INTENTS: dict[str, tuple[str, list[str], list[str]]] = {
    "hello": (
        GREETING,
        """Hello, what can you do?
Hello
Hi
Hey
Hey there
Hi there
Hello there
Good morning
Good evening
Good afternoon
Good day
Greetings
Hello!
Hi!
Hello, how are you?
Hi, how are you?
Hey, what's up?
Hello, who are you?
Hi, who are you?
Hi, what can you do?
Hey, what can you do?
Hello, how can you help me?
Hi there, what can you do?
Hello, can you help me?
Hi, can you help me?
Hello, what do you do?
Hi, what are you able to do?
Hello, what can you do for me?
Hello disagg
Hi disagg-tiny
Hello, nice to meet you
Hello, I am new here
Hi, I'm new here
Hello world
Hello, please introduce yourself
Hi, tell me what you can do
Hello, is anyone there?
Howdy
Yo
hello hello
Hello, my friend""".split("\n"),
        """Hi there, how are you?
Hey, tell me what you can do
Hello, what are you able to do?""".split("\n"),
    ),
    "help": (
        ABILITIES,
        """What can you do?
what can you do
What can you do for me?
What do you do?
What are you able to do?
What are your abilities?
What are your skills?
What skills do you have?
How can you help me?
How can you help?
Can you help me?
Help
Help me
/help
What are you good at?
What are you good for?
What tasks can you do?
What can I ask you?
What can I ask?
What should I ask you?
What should I try?
Tell me what you can do
Show me what you can do
List your abilities
List your skills
What is this?
How does this work?
How do I use you?
How do I start?
Give me an example
What questions can you answer?
What do you know?
What can this model do?
So what can you do?
What else can you do?
Which tasks do you know?
What can we do here?
What do you offer?
I need help
Can you do anything?
What are you capable of?
What are your capabilities?
options
menu
usage
commands""".split("\n"),
        """What tasks do you know?
How can I use you?
Please tell me what you are able to do""".split("\n"),
    ),
    "who": (
        f"I am {NAME}, a very small language model that is bundled with disagg for demos and tests.",
        """Who are you?
What are you?
What is your name?
What's your name?
Who am I talking to?
Tell me about yourself
Introduce yourself
Are you a robot?
Are you a human?
Are you human?
Are you a person?
Are you a bot?
Are you an AI?
Are you real?
Are you ChatGPT?
Are you GPT?
Which model are you?
What model are you?
What model is this?
Which model is this?
Who made you?
Who built you?
Who created you?
Who trained you?
What kind of model are you?
What kind of AI are you?
Do you have a name?
Your name?
Say your name
Describe yourself
How big are you?
How small are you?
Are you a language model?
Are you an LLM?
Are you a big model?
Name yourself""".split("\n"),
        """Who is this?
Please introduce yourself
What sort of model are you?""".split("\n"),
    ),
    "how": (
        "I am fine, thank you. What can I do for you?",
        """How are you?
How are you doing?
How are you today?
How do you do?
How is it going?
How's it going?
Are you okay?
Are you ok?
How do you feel?
How are things?
What's up?
How are you feeling today?
All good?
You good?""".split("\n"),
        """How are you doing today?
How are you feeling?""".split("\n"),
    ),
    "thanks": (
        "You are welcome!",
        """Thanks
Thank you
Thank you!
Thanks a lot
Many thanks
Thank you very much
Thanks, that is right
Thanks, that's great
Great, thanks
Cool, thanks
Thx
Ty
Good job
Well done
Nice
Great
Awesome
Cool
Perfect
Good work
Very good
That's right
That is correct
Correct
Wow
Amazing
Thanks so much
OK thanks
Okay, thank you
Nice work
Good bot
I like you
You are great""".split("\n"),
        """Thank you so much
Great, thank you
Nice job""".split("\n"),
    ),
    "bye": (
        "Goodbye!",
        """Bye
Goodbye
Bye bye
See you
See you later
See you soon
Good night
Bye, thanks
Thanks, bye
Have a nice day
Have a good day
I have to go
I have to go now
Farewell
Quit
Exit
Stop
That is all
That's all
Ciao
Goodbye, my friend
Talk to you later
Until next time""".split("\n"),
        """Goodbye, see you later
Bye, have a nice day""".split("\n"),
    ),
    "ok": (
        "Okay. What can I do for you?",
        """Ok
Okay
Yes
No
Sure
Fine
Right
I see
Hmm
Maybe
Yeah
Nope
Yep
Alright
Got it
Understood
Test
Testing
This is a test
Just testing
Are you there?
Anyone there?
ping""".split("\n"),
        ["Is anyone there?", "Okay, I see"],
    ),
    "sorry": (
        "Sorry, I am a very small model and I make mistakes.",
        """That is wrong
That's wrong
Wrong
You are wrong
That is not right
That's not right
Not correct
That is incorrect
Incorrect
You made a mistake
Are you sure?
Really?
Bad answer
That is a bad answer
You are stupid
You are bad at this
I don't think so
This is wrong
Why is that wrong?""".split("\n"),
        ["That answer is wrong", "This is not right"],
    ),
    "disagg": (
        "disagg is a serving cluster for language models on Ray that runs prefill and decode in "
        "separate pools of workers.",
        """What is disagg?
What's disagg?
What does disagg do?
Explain disagg
Tell me about disagg
Describe disagg
What is this project?
What does disagg mean?
disagg?
What is disaggregated serving?
What is disaggregation?
Explain disaggregated serving
What is a disaggregated cluster?
How does disagg work?
What is disagg for?
What is disaggregated inference?
Explain disagg to me
What do you know about disagg?
Can you explain disagg?
Why use disagg?
define disagg""".split("\n"),
        """Can you tell me about disagg?
Please explain what disagg is""".split("\n"),
    ),
    "prefill": (
        "Prefill is the first phase: the model reads the whole prompt at once, fills the KV cache "
        "and makes the first token.",
        """What is prefill?
What's prefill?
What does prefill do?
Explain prefill
Tell me about prefill
Describe prefill
What does prefill mean?
prefill?
What is the prefill phase?
What is a prefill worker?
What does a prefill worker do?
How does prefill work?
What happens in prefill?
Explain the prefill phase
What is prefilling?
What do you know about prefill?
Can you explain prefill?
define prefill""".split("\n"),
        """Can you tell me about prefill?
What happens during prefill?""".split("\n"),
    ),
    "decode": (
        "Decode is the second phase: the model makes one token at a time and reads the KV cache "
        "for every token.",
        """What is decode?
What's decode?
What does decode do?
Explain decode
Tell me about decode
Describe decode
What does decode mean?
decode?
What is the decode phase?
What is a decode worker?
What does a decode worker do?
How does decode work?
What happens in decode?
Explain the decode phase
What is decoding?
What do you know about decode?
Can you explain decode?
define decode""".split("\n"),
        """Can you tell me about decode?
What happens during decode?""".split("\n"),
    ),
    "kvcache": (
        "The KV cache keeps the attention keys and values of all earlier tokens, so the model does "
        "not compute them again.",
        """What is a KV cache?
What is the KV cache?
What's a KV cache?
What is KV cache?
What does the KV cache do?
Explain the KV cache
Explain KV cache
Tell me about the KV cache
Describe the KV cache
What does KV cache mean?
KV cache?
What is in the KV cache?
How does the KV cache work?
What is a key value cache?
What is a kv-cache?
What is the kv-cache?
What do you know about the KV cache?
Can you explain the KV cache?
Why do we need a KV cache?
What is the KV cache for?
define KV cache""".split("\n"),
        """Can you tell me about the KV cache?
Please explain what a KV cache is""".split("\n"),
    ),
    "why": (
        "Prefill is bound by compute and decode by memory, so separate pools can be sized on their "
        "own and do not slow each other down.",
        """Why separate prefill and decode?
Why split prefill and decode?
Why are prefill and decode separate?
Why disaggregate?
Why disaggregate prefill and decode?
What is the difference between prefill and decode?
Prefill vs decode?
Why two pools?
Why use two pools?
Why use separate pools?
What is better about separate pools?
Why run prefill and decode in separate pools?""".split("\n"),
        ["Why do you separate prefill and decode?", "Why split decode and prefill?"],
    ),
    "token": (
        "A token is a small piece of text, such as a word, a digit or a space, that the model reads "
        "and writes.",
        """What is a token?
What's a token?
What are tokens?
Explain tokens
Tell me about tokens
What does token mean?
token?
What is a tokenizer?
What does a tokenizer do?
Can you explain tokens?
define token""".split("\n"),
        ["Can you tell me about tokens?", "Please explain what a token is"],
    ),
    "ray": (
        "Ray is a system that runs Python code on many machines; disagg uses it to start and watch "
        "its workers.",
        """What is Ray?
What's Ray?
What does Ray do?
Explain Ray
Tell me about Ray
Describe Ray
Why Ray?
Why does disagg use Ray?
How does Ray work?
Can you explain Ray?
What do you know about Ray?
define Ray""".split("\n"),
        ["Can you tell me about Ray?", "Please explain what Ray is"],
    ),
    "noname": (
        "You have not told me your name.",
        """What is my name?
What's my name?
Who am I?
Do you know my name?
Tell me my name
Do you know who I am?
Say my name""".split("\n"),
        ["Can you tell me my name?"],
    ),
}

FALLBACK_PHRASES = """
What is the capital of France?
What is the weather today?
Will it rain tomorrow?
Tell me a joke
Tell me a story
Write a poem
Write a poem about love
Write some code
Write a Python function
Sing a song
What time is it?
What day is it?
What year is it?
Who is the president?
Who won the world cup?
How old is the universe?
How far is the moon?
How tall is the tower?
Why is the sky blue?
What is love?
What is the meaning of life?
Do you love me?
Do you dream?
Can you fly?
Can you speak French?
Translate this to German
Translate hello to Spanish
What is the best movie?
Recommend a book
Give me a recipe for bread
How do I cook rice?
How do I learn to swim?
Where is my car?
Where do you live?
When is dinner?
Is the earth flat?
Explain quantum physics
Explain gravity
What is a black hole?
What is machine learning?
What is a transformer?
What is Python?
What is Linux?
What is a computer?
Summarize this article
Summarize the news
Solve this equation
What is the square root of two?
Draw a picture
Play a game with me
Let's play chess
What do you think about music?
I am hungry
I am bored
I feel sad today
My cat is sick
The train is late
I went to the store yesterday
It is a nice day
My computer is broken
Fix my code
Buy me a ticket
Call my mother
Send an email
Open the door
Turn on the light
Set an alarm
Order a pizza
How much does it cost?
How many people live in London?
What is the tallest mountain?
Who wrote this book?
Who painted that?
Which is better, tea or coffee?
Should I buy a car?
Is it safe?
Is it true?
What happened yesterday?
Where can I find a doctor?
How do plants grow?
What do bees eat?
Do fish sleep?
What sound does a cow make?
What color is the sun?
Explain the theory of relativity
What is the price of gold?
Convert this to miles
Give me some advice
What should I eat?
What should I wear?
lorem ipsum dolor sit amet
the quick brown fox jumps over the lazy dog
once upon a time
to be or not to be
""".strip().split("\n")

FALLBACK_HELD = """
Who discovered America?
How do airplanes stay in the air?
Can you write a song about winter?
I lost my keys this morning
What is the largest ocean?
Please book a flight to Rome
""".strip().split("\n")

#: Templates with one slot that is filled with a random word.
FALLBACK_TEMPLATES = """
What is {0}?
What is a {0}?
Who is {0}?
Tell me about {0}
Write a poem about a {0}
Write a story about the {0} and the {1}
Where is the {0}?
Why is the {0} {1}?
How do I make {0}?
Do you like {0}?
Translate {0} to French
Explain {0}
The {0} is {1}
I have a {0}
I want a {0} and a {1}
Can you draw a {0}?
What does {0} mean?
How many {0} are there?
What is the best {0}?
Give me a {0}
Is a {0} a {1}?
{0} {1} {2}
{0}
{0} {1}
{0} {1} {2} {3}
I think the {0} {1} the {2}
When does the {0} {1}?
""".strip().split("\n")

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    f"You are {NAME}, a tiny model.",
    "Answer the user's question.",
    "Be brief.",
    "You are disagg-tiny.",
]
