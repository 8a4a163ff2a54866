//! What each copy sees of memory, page by page.

use std::collections::BTreeSet;

use vmfork_abi::Role;
use vmfork_tests::bare_guest::{Script, control};

use super::{INDEX, ROLE, printed, run};

#[test]
fn copies_do_not_see_each_others_writes() {
    const PAGES: u64 = 300;
    const FIRST: u64 = 0x40_0000;
    let page = |number: u64| FIRST + number * 4096;
    let mut script = Script::new();
    for number in 0..PAGES {
        script = script.store(page(number), 0x1000_0000 + u32::try_from(number).expect("small"));
    }
    script = script.request(1, "web", 2).ring();
    // Each VM writes to every third page, another third each, and prints all.
    for (vm, start) in [(0u32, 0u64), (1, 1), (2, 2)] {
        let mut writes = Script::new();
        for number in (start..PAGES).step_by(3) {
            writes = writes.store(page(number), 0x2000_0000 + 0x0100_0000 * vm);
        }
        script = script.only_if(control(INDEX), vm, writes);
    }
    for number in 0..PAGES {
        script = script.print(page(number));
    }
    let ended = run(&script.off());
    for (vm, name) in [(0u32, "vm"), (1, "web.1"), (2, "web.2")] {
        let expected = (0..u32::try_from(PAGES).expect("small")).map(|number| {
            if number % 3 == vm { 0x2000_0000 + 0x0100_0000 * vm } else { 0x1000_0000 + number }
        });
        assert_eq!(printed(&ended, name), expected.collect::<Vec<_>>(), "{name}");
    }
}

/// Numbers that differ from run to run; a failing test prints where they come from.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).expect("random bytes");
        let seed = u64::from_ne_bytes(seed);
        println!("seed: {seed:#x}");
        Self(seed)
    }

    /// A number below `end`: SplitMix64.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ mixed >> 31) % end as u64).expect("a number below a usize")
    }
}

#[test]
fn eight_generations_of_random_writes_are_as_a_model_says() {
    const GENERATIONS: usize = 8;
    const PAGES: usize = 160;
    const FIRST: usize = 0x40_0000;
    let mut random = Random::new();
    // Some of them neighbours, all within 48 MiB.
    let mut addresses = BTreeSet::new();
    while addresses.len() < PAGES {
        let (start, run) = (random.below(12_000), 1 + random.below(12));
        addresses.extend((start..start + run).map(|page| (FIRST + page * 4096) as u64));
    }
    let addresses: Vec<u64> = addresses.into_iter().take(PAGES).collect();
    let mut model = vec![0u32; PAGES];
    let mut mark = 0;
    let mut write = |script: Script, model: &mut [u32], random: &mut Random| {
        (0..PAGES / 3).fold(script, |script, _| {
            mark += 1;
            let page = random.below(PAGES);
            model[page] = mark;
            script.store(addresses[page], mark)
        })
    };
    let print_all = |script: Script| addresses.iter().fold(script, |script, address| script.print(*address));
    let mut script = Script::new();
    let mut expected = Vec::new();
    for seq in 1..=GENERATIONS {
        script = write(script, &mut model, &mut random).request(seq as u64, "gen", 1).ring();
        // The parent writes more, which its child must not see, and shows what it has.
        let mut parent = model.clone();
        let writes = write(Script::new(), &mut parent, &mut random);
        script = script.only_if(control(ROLE), Role::Parent.number(), print_all(writes).off());
        expected.push(parent);
    }
    script = print_all(write(script, &mut model, &mut random));
    expected.push(model);
    let ended = run(&script.off());
    for (generation, expected) in expected.iter().enumerate() {
        let name = if generation == 0 { "vm".to_owned() } else { format!("gen.{generation}") };
        assert_eq!(&printed(&ended, &name), expected, "{name}");
    }
    assert_eq!(ended.code, Some(0));
}

/// 9 MiB that a parent has written to are copied to the image of its second fork, of which it goes on as a
/// view; and so once more.
#[test]
fn a_parent_goes_on_right_after_much_was_copied() {
    const PAGES: u32 = 2304;
    let page = |number: u32| 0x40_0000 + u64::from(number) * 4096;
    let shown = [0, 1, 500, 1151, 1152, 2303];
    let print = |script: Script| shown.iter().fold(script, |script, number| script.print(page(*number)));
    let in_child =
        |script: Script| script.only_if(control(ROLE), Role::Child.number(), print(Script::new()).off());
    let mut script = in_child(Script::new().request(1, "first", 1).ring());
    for number in 0..PAGES {
        script = script.store(page(number), number + 1);
    }
    script = in_child(script.request(2, "second", 1).ring());
    script = script.store(page(1), 0x1111).store(page(2303), 0x2303);
    script = in_child(script.request(3, "third", 1).ring());
    script = script.store(page(0), 0xbad);
    let ended = run(&print(script).off());
    assert_eq!(printed(&ended, "first.1"), [0; 6]);
    assert_eq!(printed(&ended, "second.2"), shown.map(|number| number + 1));
    assert_eq!(printed(&ended, "third.3"), [1, 0x1111, 501, 1152, 1153, 0x2303]);
    assert_eq!(printed(&ended, "vm"), [0xbad, 0x1111, 501, 1152, 1153, 0x2303]);
    assert_eq!(ended.code, Some(0));
}
