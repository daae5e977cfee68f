//! Threads that work on one step together and wait for each other between its parts.
//!
//! The parts take microseconds, so a thread waits by looking again and again; after a while it lets others run. The threads end with
//! the step: a lasting pool would be missing in a forked child, and starting one takes some ten microseconds.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::abort;
use std::sync::atomic::{AtomicUsize, Ordering::*};

const LOOKS: usize = 20_000; // some 50 microseconds

/// Where all threads of a team wait for each other.
#[derive(Default)]
pub struct Barrier {
    threads: AtomicUsize, // 0 until all have been started
    arrived: AtomicUsize,
    passed: AtomicUsize, // how many times
}

impl Barrier {
    pub fn wait(&self) {
        let passed = self.passed.load(Acquire);
        if self.arrived.fetch_add(1, AcqRel) + 1 == self.threads.load(Relaxed) {
            self.arrived.store(0, Relaxed);
            self.passed.store(passed + 1, Release);
        } else {
            wait_until(|| self.passed.load(Acquire) != passed);
        }
    }
}

fn wait_until(is_so: impl Fn() -> bool) {
    for look in 1.. {
        if is_so() {
            return;
        }
        match look % LOOKS {
            0 => std::thread::yield_now(),
            _ => std::hint::spin_loop(),
        }
    }
}

/// Calls `work(index, of, barrier)` on `wanted` threads, or as many as can be started, and returns when all have returned. The first
/// of them is this one.
pub fn together(wanted: usize, work: impl Fn(usize, usize, &Barrier) + Sync) {
    let barrier = &Barrier::default();
    let work = &|index| {
        wait_until(|| barrier.threads.load(Acquire) > 0);
        let work = || work(index, barrier.threads.load(Relaxed), barrier);
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            abort(); // the others would wait for this thread forever
        }
    };
    std::thread::scope(|scope| {
        let start = |&index: &usize| std::thread::Builder::new().spawn_scoped(scope, move || work(index)).is_ok();
        let started = (1..wanted).take_while(start).count();
        barrier.threads.store(started + 1, Release);
        work(0);
    });
}
