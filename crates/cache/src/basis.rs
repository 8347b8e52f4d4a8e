//! Bases of heads: the matrices that numbers are stored by, and the way back.

use dibit_quant::Hadamard;
use nalgebra::DMatrix;
use std::sync::Arc;

/// How far `T T^-1` may be from the identity, with an inverse that is the transpose or is computed.
const IDENTITY: f64 = 1e-3;

/// How far from orthogonal a matrix may be that need not be, and is inverted by its transpose all the same: what rounding
/// to 32 bits leaves.
const ROUNDING: f32 = 1e-5;

/// For each KV head an invertible matrix T, row-major, for row vectors: of `x` is stored `x T`.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// T of each KV head, `[kv head][head_dim][head_dim]`.
    pub there: Arc<[f32]>,
    /// The transpose of T^-1 of each KV head, so that number `j` of `y T^-1` is the product of `y` and row `j`; the same
    /// numbers as `there` where T is orthogonal.
    pub back: Arc<[f32]>,
}

/// What is asked of matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The inverse is the transpose.
    Orthogonal,
    /// There is an inverse in 32 bits.
    Invertible,
}

impl Basis {
    /// The basis of these matrices, of `d` rows each.
    pub(crate) fn new(matrices: &[f32], d: usize, kind: Kind) -> Result<Self, String> {
        let there: Arc<[f32]> = matrices.into();
        let mut back = None;
        for (head, own) in matrices.chunks_exact(d * d).enumerate() {
            let inverse = transposed_inverse(own, d, kind).map_err(|what| format!("of KV head {head} {what}"))?;
            if let Some(inverse) = inverse {
                let back = back.get_or_insert_with(|| matrices.to_vec());
                back[head * d * d..(head + 1) * d * d].copy_from_slice(&inverse);
            }
        }
        Ok(Basis { back: back.map_or_else(|| there.clone(), Arc::from), there })
    }

    /// Whether all matrices are orthogonal.
    pub fn is_orthogonal(&self) -> bool {
        Arc::ptr_eq(&self.there, &self.back)
    }

    /// T^-1 of each KV head, `[kv head][d][d]`, row-major for row vectors.
    pub fn inverse(&self, d: usize) -> Vec<f32> {
        let heads = self.back.chunks_exact(d * d);
        heads.flat_map(|own| (0..d * d).map(move |at| own[at % d * d + at / d])).collect()
    }

    /// The same Hadamard matrix for each of `heads` KV heads.
    pub fn of_hadamard(hadamard: &Hadamard, heads: usize) -> Self {
        let d = hadamard.order();
        let mut matrix = vec![0.0; d * d];
        for (i, row) in matrix.chunks_exact_mut(d).enumerate() {
            row[i] = 1.0;
            hadamard.apply(row);
        }
        let there: Arc<[f32]> = matrix.repeat(heads).into();
        Basis { back: there.clone(), there }
    }
}

/// T^-T; `None` where it is T itself.
fn transposed_inverse(matrix: &[f32], d: usize, kind: Kind) -> Result<Option<Vec<f32>>, String> {
    if matrix.iter().any(|x| !x.is_finite()) {
        return Err("holds a number that is not finite".into());
    }
    let skew = skew(matrix, d);
    let (orthogonal, most) = match kind {
        Kind::Orthogonal => (true, IDENTITY as f32),
        Kind::Invertible => (false, ROUNDING),
    };
    if skew <= most {
        return Ok(None);
    }
    if orthogonal {
        return Err("is not orthogonal".into());
    }
    let own = DMatrix::from_row_iterator(d, d, matrix.iter().map(|x| f64::from(*x)));
    let singular = || "cannot be inverted".to_owned();
    // LU with partial pivoting.
    let inverse = own.clone().lu().try_inverse().ok_or_else(singular)?.map(|x| f64::from(x as f32));
    let error = (own * &inverse - DMatrix::identity(d, d)).iter().fold(0f64, |most, x| most.max(x.abs()));
    // What is finite in 32 bits has finite products in 64.
    if inverse.iter().any(|x| !x.is_finite()) || error > IDENTITY {
        return Err(format!("{}: T T^-1 is {error:.1e} from the identity, more than {IDENTITY:.0e}", singular()));
    }
    // Columns of the inverse one after the other are the rows of its transpose.
    Ok(Some(inverse.iter().map(|x| *x as f32).collect()))
}

/// How far `T T^T` is from the identity.
fn skew(matrix: &[f32], d: usize) -> f32 {
    let rows: Vec<&[f32]> = matrix.chunks_exact(d).collect();
    let mut most = 0f32;
    for (i, a) in rows.iter().enumerate() {
        for (j, b) in rows.iter().enumerate().skip(i) {
            let dot: f32 = a.iter().zip(*b).map(|(a, b)| a * b).sum();
            let off = (dot - if i == j { 1.0 } else { 0.0 }).abs();
            // Sums of large numbers may be no numbers.
            most = if off.is_nan() { f32::INFINITY } else { most.max(off) };
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: usize = 8;

    fn noise(seed: u64) -> Vec<f32> {
        let mut state = seed * 0x9e37_79b9_7f4a_7c15 + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..D * D).map(|_| next()).collect()
    }

    #[test]
    fn the_way_back_undoes_the_way_there() {
        let matrices = [noise(1), noise(2)].concat();
        let basis = Basis::new(&matrices, D, Kind::Invertible).unwrap();
        assert_eq!(*basis.there, *matrices);
        for (there, back) in basis.there.chunks_exact(D * D).zip(basis.back.chunks_exact(D * D)) {
            let x = &noise(3)[..D];
            let stored: Vec<f32> = (0..D).map(|j| (0..D).map(|i| x[i] * there[i * D + j]).sum()).collect();
            for (x, row) in x.iter().zip(back.chunks_exact(D)) {
                let found: f32 = stored.iter().zip(row).map(|(a, b)| a * b).sum();
                assert!((x - found).abs() < 1e-4, "{x} {found}");
            }
        }
        let transposed = |own: &[f32], at: usize| own[at % D * D + at / D];
        for (inverse, back) in basis.inverse(D).chunks_exact(D * D).zip(basis.back.chunks_exact(D * D)) {
            assert!((0..D * D).all(|at| inverse[at] == transposed(back, at)));
        }
        assert!(!basis.is_orthogonal());
    }

    #[test]
    fn orthogonal_matrices_are_their_own_way_back() {
        let turned = Basis::of_hadamard(&Hadamard::new(D).unwrap(), 2);
        for kind in [Kind::Orthogonal, Kind::Invertible] {
            let basis = Basis::new(&turned.there, D, kind).unwrap();
            assert_eq!(basis, turned);
            assert!(basis.is_orthogonal());
        }
        // One head that is not orthogonal leaves the others what they are.
        let mixed = [&turned.there[..D * D], &noise(1)].concat();
        assert!(Basis::new(&mixed, D, Kind::Orthogonal).unwrap_err().contains("KV head 1 is not orthogonal"));
        let basis = Basis::new(&mixed, D, Kind::Invertible).unwrap();
        assert_eq!((&basis.back[..D * D], &basis.there[D * D..]), (&mixed[..D * D], &mixed[D * D..]));
        assert_ne!(basis.back[D * D..], basis.there[D * D..]);
    }

    #[test]
    fn what_has_no_inverse_is_refused() {
        let refused = |matrix: Vec<f32>| Basis::new(&matrix, D, Kind::Invertible).unwrap_err();
        assert!(refused(vec![0.0; D * D]).contains("KV head 0 cannot be inverted"));
        let mut twice = noise(1);
        twice.copy_within(..D, D);
        assert!(refused(twice.clone()).contains("cannot be inverted"));
        // As near to singular as 32 bits allow.
        twice[D] += 1e-7;
        assert!(refused(twice).contains("cannot be inverted"));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut matrix = noise(1);
            matrix[9] = bad;
            assert!(refused(matrix).contains("not finite"));
        }
        assert!(refused(vec![1e30; D * D]).contains("cannot be inverted"));
    }
}
