//! The word of features, as a guest finds it: in CPUID without privilege, and in the control page's header.

use std::mem::offset_of;

use vmfork_abi::{
    Header, PAGE,
    cpuid::{LEAF_FEATURES, LEAF_SIGNATURE},
    features::{ASKER, COPIES, GENERATION_PAGE, LOCATION},
};
use vmfork_tests::bare_guest::{Script, control};

use super::{join, printed, run};

/// Where the guest keeps what CPUID has answered.
const ANSWER: u64 = 0x40_0000;

/// Prints the highest leaf, the leaf of the features, and both halves of the header's word.
fn look() -> Script {
    let highest = Script::new().cpuid(LEAF_SIGNATURE, ANSWER).print(ANSWER).cpuid(LEAF_FEATURES, ANSWER);
    let leaf = (0..4).fold(highest, |script, register| script.print(ANSWER + 4 * register));
    let word = control(PAGE.header.offset + offset_of!(Header, features));
    leaf.print(word).print(word + 4)
}

#[test]
fn parent_and_child_are_promised_the_same_in_cpuid_and_in_the_page() {
    let low = u32::try_from(LOCATION | COPIES | GENERATION_PAGE | ASKER).expect("four bits");
    let found = [LEAF_FEATURES, low, 0, 0, 0, low, 0];
    let forked = join(look(), Script::new().request(1, "web", 2).ring());
    let ended = run(&join(forked, look()).off());
    assert_eq!(printed(&ended, "vm"), [found, found].concat());
    for child in ["web.1", "web.2"] {
        assert_eq!(printed(&ended, child), found, "{child}");
    }
    assert_eq!(ended.code, Some(0));
}
