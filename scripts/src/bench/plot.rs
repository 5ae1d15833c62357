// SPDX-License-Identifier: GPL-2.0-only

//! Drawings of tables: bars for what is compared, one group for each row, an SVG file for each number.

use super::table::{self, Series};
use super::Table;
use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::fs;
use std::path::Path;

/// In pixels.
const WIDTH: i32 = 860;
const MARGIN: i32 = 12;
const TITLES: i32 = 290;
const VALUES: i32 = 80;
const BAR: i32 = 14;
const GAP: i32 = 9;
const HEAD: i32 = 82;

const FONT: (&str, i32) = ("sans-serif", 15);

/// What the sides look like, the first one's being the driver.
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x5f, 0xa8),
    RGBColor(0xe0, 0x8a, 0x1e),
    RGBColor(0x8a, 0x8a, 0x8a),
    RGBColor(0xc4, 0xc4, 0xc4),
];

/// Draws all numbers of `table` to files in `dir`, whose names begin with `name`.
pub fn all(dir: &Path, name: &str, table: &Table, counted: bool) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let machine = format!(
        "Linux {}, {}",
        table.machine.kernel, table.machine.accelerator
    );
    for (n, part) in table.parts.iter().enumerate() {
        for series in table::series(&part.rows, counted) {
            let part_name = match n {
                0 => String::new(),
                n => format!("-{}", n + 1),
            };
            let path = dir.join(format!("{name}{part_name}-{}.svg", slug(series.heading)));
            let svg = draw(&part.columns, &series, &machine)
                .with_context(|| format!("cannot draw {}", path.display()))?;
            fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

/// As a part of a file's name.
fn slug(heading: &str) -> String {
    let letters = heading.chars().map(|c| match c.is_ascii_alphanumeric() {
        true => c.to_ascii_lowercase(),
        false => '-',
    });
    letters.collect::<String>().replace("--", "-")
}

fn draw(columns: &[&str], series: &Series, machine: &str) -> Result<String> {
    let group = columns.len() as i32 * BAR + GAP;
    let height = HEAD + series.rows.len() as i32 * group + MARGIN;
    let values = series.rows.iter().flat_map(|(_, values)| values);
    let most = values.flatten().copied().fold(0.0, f64::max);
    let room = f64::from(WIDTH - TITLES - VALUES);
    let mut svg = String::new();
    {
        let area =
            SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        let text = |size, pos| TextStyle::from((FONT.0, size).into_font()).pos(pos);
        let left = Pos::new(HPos::Left, VPos::Center);
        area.fill(&WHITE)?;
        area.draw_text(series.heading, &text(FONT.1 + 2, left), (MARGIN, 18))?;
        area.draw_text(machine, &text(FONT.1 - 2, left), (MARGIN, 38))?;
        for (n, column) in columns.iter().enumerate() {
            let x = TITLES + n as i32 * 110;
            area.draw(&Rectangle::new([(x, 55), (x + 10, 65)], colour(n).filled()))?;
            area.draw_text(column, &text(FONT.1, left), (x + 15, 60))?;
        }
        for (n, (title, values)) in series.rows.iter().enumerate() {
            let top = HEAD + n as i32 * group;
            let middle = top + (group - GAP) / 2;
            let right = text(FONT.1, Pos::new(HPos::Right, VPos::Center));
            area.draw_text(title, &right, (TITLES - 8, middle))?;
            for (side, value) in values.iter().enumerate() {
                let Some(value) = value else {
                    continue;
                };
                let y = top + side as i32 * BAR;
                // A share of the width, which is at most all of it.
                let length = match most > 0.0 {
                    true => (value / most * room) as i32,
                    false => 0,
                };
                let corners = [(TITLES, y + 1), (TITLES + length, y + BAR - 1)];
                area.draw(&Rectangle::new(corners, colour(side).filled()))?;
                let number = format!("{value:.*}", series.digits);
                let place = (TITLES + length + 4, y + BAR / 2);
                area.draw_text(&number, &text(FONT.1 - 2, left), place)?;
            }
        }
        area.present()?;
    }
    Ok(svg)
}

fn colour(side: usize) -> RGBColor {
    COLOURS[side % COLOURS.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_a_bar() {
        let series = Series {
            heading: "GB a second",
            digits: 2,
            rows: vec![
                ("read", vec![Some(2.0), Some(1.0)]),
                ("write", vec![Some(0.5), None]),
            ],
        };
        let svg = draw(&["a", "b"], &series, "a machine").unwrap();
        for text in [
            "GB a second",
            "a machine",
            "read",
            "write",
            "2.00",
            "1.00",
            "0.50",
        ] {
            assert!(svg.contains(text), "{text} is missing:\n{svg}");
        }
        // The background, two of the legend, and the bars.
        assert_eq!(svg.matches("<rect").count(), 1 + 2 + 3);
        assert_eq!(slug(series.heading), "gb-a-second");
    }
}
