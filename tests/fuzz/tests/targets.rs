// SPDX-License-Identifier: GPL-2.0-only

//! The fuzzer's targets, where no fuzzer is: with bytes at random, and with text that looks like what they want.

use pmem_fuzz::TARGETS;
use proptest::prelude::*;

/// Bytes: all at random, or of few values, or words that the targets know.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        "4G",
        "0x100000000",
        "512MiB",
        "2M",
        "1kB",
        ",",
        "wb",
        "wc",
        "ram",
        "dev",
        "blk",
        "none",
        "1",
        "0",
        "on",
        "no",
        "\0",
        "\0\0",
        "K",
        "iB",
        "18446744073709551615",
        "4096",
        "512",
        "auto",
        " ",
        "\n",
        "é",
    ]);
    let text = prop::collection::vec(word, 0..40).prop_map(|words| words.concat().into_bytes());
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..900),
        prop::collection::vec(prop::sample::select(vec![0, 1, 2, 3, 64, 255u8]), 0..900),
        (prop::collection::vec(any::<u8>(), 0..9), text)
            .prop_map(|(head, text)| [head, text].concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 1000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_breaks_a_promise(data in bytes()) {
        for (_, target) in TARGETS {
            target(&data);
        }
    }
}

/// What a fuzzer, or a person, has found once is tried each time: files in `corpus`, by target.
#[test]
fn what_was_found_is_tried_again() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        for entry in std::fs::read_dir(corpus.join(name)).into_iter().flatten() {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            target(&std::fs::read(path).unwrap());
        }
    }
}
