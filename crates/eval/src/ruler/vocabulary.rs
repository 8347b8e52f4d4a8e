//! Ordinary English words for keys and word lists.

use super::random::Random;
use std::collections::BTreeSet;
use std::sync::LazyLock;

const ADJECTIVES: &str = "\
able ample ancient angry awake bald bare basic bent big bitter bland blank bleak blind blue blunt bold brave brief \
bright brisk broad broken brown bumpy busy calm careful cheap cheerful chilly civil clean clear clever cloudy clumsy \
coarse cold cool costly crisp crooked cruel curious curly damp daring dark dear deep dense dim dirty distant double \
dry dull dusty eager early easy elder empty endless equal even exact faint fair faithful false famous fancy fast fat \
fierce final fine firm flat fluffy foggy fond formal fragile frail frank free fresh friendly frozen full funny fuzzy \
gentle giant glad gloomy golden good grand grateful gray great greedy green grim gruff handy happy hard harsh hasty \
healthy heavy helpful hidden high hollow honest hot huge humble humid hungry icy idle jolly keen kind large late lazy \
lean light little lively local lonely long loose lost loud lovely low loyal lucky mad massive mellow merry mighty mild \
modern modest muddy narrow nasty neat new nice noble noisy numb odd old open orange pale patient plain pleasant polite \
poor precious pretty proud pure purple quaint quick quiet rapid rare raw ready red remote rich rigid ripe rough round \
royal rude rural rusty sad safe salty scarce secret serious shallow sharp shiny short shy silent silly silver simple \
sincere slim slow small smart smooth snowy sober soft solid sour spare spicy steady steep stern sticky stiff still \
stormy strange strict strong sturdy subtle sudden sunny sweet swift tall tame tart tender tense thick thin thirsty \
tidy tight tiny tired tough tricky true upper urgent useful vague vast violet vivid warm wary wavy weak wealthy weird \
wet white whole wide wild wise witty wooden worthy yellow young zany";

const NOUNS: &str = "\
acorn actor alley anchor ankle apple apron arch arm armor arrow attic aunt autumn avenue axe bacon badge bag baker \
balcony ball bamboo banana band bank barn barrel basin basket bath bay beach bead beam bean bear beard beast bed bee \
beetle bell belt bench berry bike bird biscuit blanket blossom board boat bone book boot border bottle boulder bow \
bowl box bracelet branch bread breeze brick bridge broom brother bucket bug builder bull bush butter button cabin \
cable cactus cage cake calf camel camera camp canal candle cane canoe canvas cap cape captain car card carpet carrot \
cart castle cat cave cellar chain chair chalk cheese cherry chest chicken child chimney church circle city clay cliff \
clock cloth cloud clover clown coach coal coast coat cobweb coffee coin collar comb comet cook copper coral cord corn \
corner cottage cotton couch cousin cow crab cradle crane crate creek crew cricket crow crown cube cup curtain cushion \
daisy dam dancer dawn deer desert desk dessert diamond dinner dish doctor dog doll donkey door dove dragon drawer \
dress drum duck eagle ear earth egg elbow elephant elm engine evening eye face falcon family farm farmer feather \
fence fern ferry field finger fire fish flag flame flour flower flute fly foot forest fork fortress fountain fox \
frog fruit garage garden garlic gate ghost giraffe glacier glass glove goat gold goose grape grass grove guest guitar \
hail hall hammer hand harbor harp hat hawk hay heart hedge helmet hen hill hinge honey hood hook horn horse hospital \
hotel hour house hunter island ivory ivy jacket jar jewel judge jug juice jungle kettle key king kitchen kite kitten \
knee knife knight knot ladder lady lake lamb lamp lantern lawn leaf leather lemon letter library lily lion lizard \
lobster lock locket log lunch magnet maid map maple marble market mast meadow meal melon metal milk mill miner mint \
mirror mist mitten monkey month moon moose morning moth mother motor mountain mouse mouth mule museum mushroom nail \
napkin neck needle nest net night north nose notebook nurse nut oak oar oasis ocean olive onion orchard otter oven owl \
ox oyster page pail painter palace palm pan panda paper parade parrot party path peach peacock pear pearl pebble \
pen pencil pepper piano pickle picture pie pig pigeon pillow pilot pine pipe pirate plane planet plate plum pocket \
poet pond pony porch potato prairie prince pumpkin puppy purse quarry queen quilt rabbit radio raft rail rain rake \
ranch raven reed ribbon rice ring river road robin rocket roof room root rope rose ruby rug saddle sail salad salmon \
sand sauce scarf school scissors sea seal seed shark shed sheep shelf shell shepherd ship shirt shoe shop shovel \
sister skirt sky sleeve slipper snail snake snow soap sock sofa soldier song soup spider spoon spring squirrel stable \
stair star statue stick stone stove straw stream street string student sugar suit sun swan sweater table tailor tea \
teacher temple tent theater thimble thread throne thumb tiger toad toast tomato tongue tooth torch tower town toy \
trail train tray tree trumpet trunk tulip tunnel turkey turtle uncle valley vase vest village vine violin voyage \
wagon waiter walnut walrus water wave weaver whale wheat wheel whistle willow wind window winter wire wolf wood wool \
yard year zebra";

const VERBS: &str = "\
accept admire admit advise agree allow announce appear argue arrive ask assist attend avoid bake bathe become begin \
behave believe belong blame bless boil borrow bounce breathe bring build bury buy call carry catch cause celebrate \
change chase choose chop claim climb collect come compare complain confess confuse connect consider continue count \
cover crawl create cross cry dance decide decorate defend deliver depend describe destroy develop dig disagree \
discover dive divide draw dream drink drive drop earn eat encourage enjoy enter escape examine excuse exist expand \
expect explain explore fail fall fasten feed feel fetch fight fill find finish float fold follow forget forgive fry \
gather give glow glue grab greet grow guess guide happen heal hear help hide hop hope hug hunt hurry imagine improve \
include inform invent invite join juggle jump keep kick kneel knit knock know laugh learn leave lend lift listen live \
look lose love make marry measure meet melt mend mix move multiply need notice obey observe offer pack paint pause pay \
peel perform pick plant play pour practice pray prepare present pretend prevent produce promise protect provide pull \
punish push raise reach read receive recognize refuse relax remain remember remind repair repeat replace reply rescue \
rest return ride rise roll rub run save scatter scream search see sell send separate serve settle shake share shave \
shout show sing sit skip sleep slide smile sneeze solve speak spell spend spill stand stare start stay steal stir stop \
stretch study succeed suggest supply support surprise surround swim swing talk teach tear tell thank think throw tie \
touch travel treat try twist unite use visit wait wake walk wander want warn wash waste watch wear whisper win wish \
wonder work worry wrap write yawn";

struct Vocabulary {
    adjectives: Vec<&'static str>,
    nouns: Vec<&'static str>,
    /// All words, each once, in alphabetical order.
    words: Vec<&'static str>,
}

static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(|| {
    let [adjectives, nouns, verbs] = [ADJECTIVES, NOUNS, VERBS].map(|list| list.split_whitespace().collect::<Vec<_>>());
    let words = [&adjectives[..], &nouns, &verbs].concat().into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    Vocabulary { adjectives, nouns, words }
});

/// How many different keys there are.
pub(super) fn num_keys() -> usize {
    VOCABULARY.adjectives.len() * VOCABULARY.nouns.len()
}

/// An adjective and a noun, as in `quiet-river`.
pub(super) fn key(random: &mut Random) -> String {
    let Vocabulary { adjectives, nouns, .. } = &*VOCABULARY;
    format!("{}-{}", adjectives[random.below(adjectives.len())], nouns[random.below(nouns.len())])
}

/// So many different words; where there are not as many, keys too. At most half of [`num_keys`].
pub(super) fn words(count: usize, random: &mut Random) -> Vec<String> {
    let mut words: Vec<String> = VOCABULARY.words.iter().map(|word| (*word).to_owned()).collect();
    words.extend(random.distinct(count.saturating_sub(words.len()), key));
    random.shuffle(&mut words);
    words.truncate(count);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_list_names_a_word_once() {
        let Vocabulary { adjectives, nouns, words } = &*VOCABULARY;
        let verbs: Vec<&str> = VERBS.split_whitespace().collect();
        for list in [adjectives, nouns, &verbs, words] {
            let mut seen = HashSet::new();
            for word in list {
                assert!(word.bytes().all(|byte| byte.is_ascii_lowercase()), "{word}");
                assert!(seen.insert(word), "{word} is there twice");
            }
        }
        assert!(words.len() > 900 && num_keys() > 100_000, "{} words, {} keys", words.len(), num_keys());
    }

    #[test]
    fn words_are_different_also_where_keys_must_help() {
        let singles = VOCABULARY.words.len();
        for (count, keys) in [(10, 0), (singles, 0), (singles + 1, 1), (20_000, 20_000 - singles)] {
            let drawn = words(count, &mut Random::new(1, 0));
            assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), count);
            assert_eq!(drawn.iter().filter(|word| word.contains('-')).count(), keys);
        }
    }
}
