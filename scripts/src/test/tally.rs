// SPDX-License-Identifier: GPL-2.0-only

//! Counts of tests, read from what test programs print.

use std::fmt;
use std::ops::AddAssign;

/// How many tests passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
}

impl Tally {
    /// One check that passed or failed.
    pub fn of(passed: bool) -> Tally {
        Tally {
            passed: passed.into(),
            failed: (!passed).into(),
        }
    }

    /// Reads a line of `cargo test`: `test result: ok. 12 passed; 0 failed; 1 ignored; ...`.
    pub fn from_libtest(line: &str) -> Option<Tally> {
        let counts = line.split_once("test result: ")?.1;
        Some(Tally {
            passed: before(counts, " passed;")?,
            failed: before(counts, " failed;")?,
        })
    }

    /// Reads the line of the kernel's own parser: `Testing complete. Ran 12 tests: passed: 11, failed: 1`.
    ///
    /// What was skipped failed: the guest has all that the tests want.
    pub fn from_kunit(line: &str) -> Option<Tally> {
        let counts = line.split_once("Testing complete. Ran ")?.1;
        let count = |name: &str| after(counts, name).unwrap_or(0);
        Some(Tally {
            passed: count(" passed: "),
            failed: count(" failed: ")
                + count(" crashed: ")
                + count(" errors: ")
                + count(" skipped: "),
        })
    }
}

/// The number that ends where `mark` begins.
fn before(text: &str, mark: &str) -> Option<u64> {
    let digits = text.split_once(mark)?.0;
    digits
        .rsplit(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// The number that begins where `mark` ends.
fn after(text: &str, mark: &str) -> Option<u64> {
    let digits = text.split_once(mark)?.1;
    digits
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64) -> Option<Tally> {
        Some(Tally { passed, failed })
    }

    /// A miscount would report a broken driver as tested.
    #[test]
    fn counts_are_read() {
        let libtest = [
            (
                "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out",
                tally(12, 0),
            ),
            (
                "test result: FAILED. 0 passed; 34 failed; 0 ignored; 0 measured",
                tally(0, 34),
            ),
            (
                "test result: \u{1b}[32mok\u{1b}[0m. 1 passed; 2 failed;",
                tally(1, 2),
            ),
            ("test size::tests::table ... ok", None),
            ("12 passed; 0 failed;", None),
        ];
        for (line, expected) in libtest {
            assert_eq!(Tally::from_libtest(line), expected, "{line}");
        }
        let kunit = [
            ("[08:00:00] Testing complete. Ran 12 tests: passed: 12", tally(12, 0)),
            ("Testing complete. Ran 9 tests: passed: 5, failed: 1, crashed: 2, skipped: 1, errors: 3", tally(5, 7)),
            ("Testing complete. Ran 0 tests: errors: 1", tally(0, 1)),
            ("Ran 12 tests: passed: 12", None),
        ];
        for (line, expected) in kunit {
            assert_eq!(Tally::from_kunit(line), expected, "{line}");
        }
    }
}
