//! Rows that are stored as they attend.

use super::*;
use dibit_device::QueryHeads;

/// Attends to the same row of a stepwise pass so many times, and packs.
fn attend_times(times: usize) {
    let cpu = Cpu::new(Some(1)).unwrap();
    let case = Case::new(scheme("kivi"), 1, 1, 64);
    let mut cache = case.cache(&cpu, 8, 1, 8);
    let sequence = cache.open().unwrap();
    let mut batch = Batch::new(Mode::Streaming);
    batch.push(cache.manager(), &sequence, 1);
    let (row, mut out) = (vec![0.5; 64], vec![0.0; 64]);
    let attend = |pass: &mut Pass<Cpu>| {
        pass.skip_to(LAYER);
        let mut layer = pass.layer(&Vec::new(), 1)?;
        let mut rows = layer.stage(1, &row, &row)?;
        (0..times).try_for_each(|_| rows.attend(QueryHeads::plain(1), &row, &mut out))?;
        layer.pack()
    };
    cache.pass_once::<DeviceError>(&cpu, &batch, attend).unwrap();
    assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6), "{out:?}");
}

#[test]
fn rows_that_are_stored_as_they_attend_attend_once() {
    attend_times(1);
}

#[test]
#[should_panic = "rows of a stepwise batch attend once"]
fn a_row_is_not_stored_twice() {
    attend_times(2);
}

#[test]
#[should_panic = "rows that are packed"]
fn what_has_not_been_stored_is_not_packed() {
    attend_times(0);
}
