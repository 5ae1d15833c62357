// SPDX-License-Identifier: GPL-2.0-only

//! The series of kernels that the driver is for.

use std::fmt;

/// Which those are is said there, and nowhere else.
const KBUILD: &str = include_str!("../../../Kbuild");

/// A series of kernels that the driver is for, such as `7.3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Series(&'static str);

impl Series {
    /// All of them, the oldest first.
    pub fn all() -> Vec<Series> {
        listed(KBUILD).map(Series).collect()
    }

    /// The newest, which the driver is written for.
    ///
    /// # Panics
    ///
    /// If Kbuild lists none, which a test rules out.
    pub fn newest() -> Series {
        listed(KBUILD)
            .last()
            .map(Series)
            .expect("Kbuild lists no kernels")
    }

    /// The one that `version` is of: `7.3` itself, or `7.3.4+deb13`.
    pub fn of(version: &str) -> Option<Series> {
        listed(KBUILD)
            .find(|series| {
                let rest = version.strip_prefix(series);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
            .map(Series)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The series that a Kbuild file lists.
fn listed(kbuild: &str) -> impl Iterator<Item = &str> {
    kbuild
        .lines()
        .find_map(|line| line.strip_prefix("pmem-kernels := "))
        .unwrap_or_default()
        .split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kbuild_lists_series_from_old_to_new() {
        let numbers: Vec<Vec<u32>> = Series::all()
            .iter()
            .map(|series| {
                let numbers = series.name().split('.');
                numbers.map(|number| number.parse().unwrap()).collect()
            })
            .collect();
        assert!(numbers.len() > 1, "{numbers:?}");
        assert!(numbers.iter().all(|series| series.len() == 2));
        assert!(numbers.windows(2).all(|two| two[0] < two[1]), "{numbers:?}");
        assert_eq!(Some(&Series::newest()), Series::all().last());
    }

    #[test]
    fn versions_are_of_their_series() {
        for (version, expected) in [
            ("7.2", Some("7.2")),
            ("7.2.12+deb13", Some("7.2")),
            ("7.3.4+deb13.1", Some("7.3")),
            ("7.30.1+deb13", None),
            ("7.4.1+deb13", None),
            ("17.3.1", None),
            ("7", None),
            ("", None),
        ] {
            assert_eq!(Series::of(version).map(Series::name), expected, "{version}");
        }
    }
}
